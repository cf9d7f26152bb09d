//! What only workers ask each other.

use axum::{Extension, Json};
use decant_api::{Code, Empty};
use decant_base::crash;
use decant_drain::Event;
use decant_drain::drain::{DrainOrder, DrainRow};

use crate::errands::{self, Facts};
use crate::peers::{Messages, Standing};
use crate::server::extract::Body;
use crate::server::fail::Fail;
use crate::server::{Caller, Shared};

/// Where drains of another worker are ordered and read.
pub(super) const DRAINS_PATH: &str = "/v1/peer/drains";

/// Takes messages. They are in the core's queue when this answers, not stepped: a message is answered by messages.
pub(super) async fn messages(
    agent: Shared,
    Extension(caller): Extension<Caller>,
    Body(batch): Body<Messages>,
) -> Result<Json<Empty>, Fail> {
    let Caller::Peer(from) = caller else {
        return Err(Fail::new(Code::Forbidden, "not allowed", "only a worker sends messages", "use the other paths"));
    };
    for message in batch.messages {
        crash::point(message.body.points().received);
        let machine = message.machine.clone();
        agent.core.event(&machine, Event::Received { from: from.clone(), message: Box::new(message) });
    }
    Ok(Json(Empty {}))
}

pub(super) async fn standing(agent: Shared) -> Json<Standing> {
    Json(agent.standing().await)
}

pub(super) async fn facts(agent: Shared) -> Json<Facts> {
    Json(errands::facts(&agent).await)
}

pub(super) async fn drains(agent: Shared) -> Json<Vec<DrainRow>> {
    Json(agent.rows.drains().iter().map(|row| (**row).clone()).collect())
}

pub(super) async fn start_drain(agent: Shared, Body(order): Body<DrainOrder>) -> Result<Json<DrainRow>, Fail> {
    let row = agent.core.start_drain(order).await?;
    Ok(Json((*row).clone()))
}
