//! Bodies, ids and queries, whose faults are failures of this API like any other.

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use decant_api::Code;
use serde::de::DeserializeOwned;

use crate::server::fail::Fail;

/// A JSON body; an empty one is `{}`.
pub(super) struct Body<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Fail;

    async fn from_request(request: Request, state: &S) -> Result<Self, Fail> {
        let bytes = Bytes::from_request(request, state).await.map_err(|rejection| {
            Fail::new(Code::TooLong, "request too long", rejection.body_text(), "send less in one request")
        })?;
        let text: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
        serde_json::from_slice(text).map(Self).map_err(|error| {
            Fail::invalid(
                format!("the body is not understood: {error}"),
                "use the same version of decant on both sides",
            )
        })
    }
}

/// The id in the path.
pub(super) struct Id<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Id<T> {
    type Rejection = Fail;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Fail> {
        match Path::<T>::from_request_parts(parts, state).await {
            Ok(Path(id)) => Ok(Self(id)),
            Err(rejection) => Err(Fail::invalid(rejection.body_text(), "write the id as `list` shows it")),
        }
    }
}

/// The query.
pub(super) struct Args<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Args<T> {
    type Rejection = Fail;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Fail> {
        match Query::<T>::from_request_parts(parts, state).await {
            Ok(Query(args)) => Ok(Self(args)),
            Err(rejection) => Err(Fail::invalid(rejection.body_text(), "see the table of paths in docs/agent.md")),
        }
    }
}

/// `?scope=`.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ScopeArgs {
    #[serde(default)]
    pub(super) scope: decant_api::Scope,
}
