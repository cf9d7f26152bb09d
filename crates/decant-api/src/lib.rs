//! Requests, responses and error codes of the agent's API.
