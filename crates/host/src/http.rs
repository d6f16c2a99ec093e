//! The control interface: routes, and the document that is made from them.
//!
//! Each route parses, calls one method of [`Host`] on a thread that may block, and encodes. What is
//! refused leaves as [`ErrorBody`] with a status that follows from its kind, errors of the HTTP
//! layer included, so that a client reads one form only.

use crate::api::{
    BalloonBody, CommandBody, ErrorBody, ErrorKind, GuestReport, HostInfo, IncomingInfo,
    LimitsPatch, MigrateAnswer, MigrateBody, MigrationInfo, PreflightInfo, ResolveBody,
    SectionInfo, VmInfo, VmSpec,
};
use crate::host::Host;
use crate::refusal::Refusal;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;
use utoipa::openapi::OpenApi;
use utoipa::{IntoParams, OpenApi as _, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

type Answer<T> = Result<Json<T>, Refusal>;
type Of = State<Arc<Host>>;

/// An answer without content: what was asked for has been done.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
pub struct Done {}

#[derive(utoipa::OpenApi)]
#[openapi(info(
    title = "limosa host",
    description = "Control interface of the limosa daemon: HTTP and JSON over the Unix socket \
                   `host.sock` in its state directory. Sizes are bytes (`*_bytes`), times \
                   milliseconds (`*_ms`), rates a second."
))]
struct Document;

/// The routes, and the document of them.
fn routes() -> (Router<Arc<Host>>, OpenApi) {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(host))
        .routes(routes!(list_vms, run_vm))
        .routes(routes!(show_vm, stop_vm))
        .routes(routes!(inspect_vm))
        .routes(routes!(show_guest))
        .routes(routes!(command_guest))
        .routes(routes!(set_balloon))
        .routes(routes!(migrate_vm))
        .routes(routes!(preflight_vm))
        .routes(routes!(list_migrations))
        .routes(routes!(show_migration, set_limits))
        .routes(routes!(abort_migration))
        .routes(routes!(resolve_migration))
        .routes(routes!(list_incoming))
        .routes(routes!(show_openapi))
        .split_for_parts()
}

/// The interface for a host.
pub fn router(host: Arc<Host>) -> Router {
    let (router, _) = routes();
    router
        .fallback(async || Refusal::not_found("no such route: GET /v1/openapi.json lists them"))
        .method_not_allowed_fallback(async || {
            Refusal::bad_request("the route has no such method: GET /v1/openapi.json lists them")
        })
        .with_state(host)
}

/// The document of the interface.
pub fn openapi() -> OpenApi {
    routes().1
}

/// What the daemon is
#[utoipa::path(get, path = "/v1/host", responses((status = 200, body = HostInfo)))]
async fn host(State(host): Of) -> Answer<HostInfo> {
    blocking(move || host.info()).await
}

/// All virtual machines
#[utoipa::path(get, path = "/v1/vms", responses((status = 200, body = Vec<VmInfo>)))]
async fn list_vms(State(host): Of) -> Answer<Vec<VmInfo>> {
    blocking(move || Ok(host.vms())).await
}

/// Make a virtual machine and start it
#[utoipa::path(post, path = "/v1/vms", request_body = VmSpec,
    responses((status = 200, body = VmInfo), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)))]
async fn run_vm(State(host): Of, Body(spec): Body<VmSpec>) -> Answer<VmInfo> {
    blocking(move || host.run(&spec)).await
}

/// One virtual machine
#[utoipa::path(get, path = "/v1/vms/{name}", params(("name" = String, Path)),
    responses((status = 200, body = VmInfo), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)))]
async fn show_vm(State(host): Of, Path(name): Path<String>) -> Answer<VmInfo> {
    blocking(move || host.vm(&name)).await
}

/// How to end a virtual machine.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct StopQuery {
    /// Abort its migration, kill its process if it does not end by itself.
    #[serde(default)]
    force: bool,
}

/// End a virtual machine, or remove one that ended
#[utoipa::path(delete, path = "/v1/vms/{name}", params(("name" = String, Path), StopQuery),
    responses((status = 200, body = Done), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)))]
async fn stop_vm(
    State(host): Of,
    Path(name): Path<String>,
    Query(query): Query<StopQuery>,
) -> Answer<Done> {
    blocking(move || host.stop(&name, query.force).map(|()| Done {})).await
}

/// Every part of the state that would move with it
#[utoipa::path(get, path = "/v1/vms/{name}/inspect", params(("name" = String, Path)),
    responses((status = 200, body = Vec<SectionInfo>), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)))]
async fn inspect_vm(State(host): Of, Path(name): Path<String>) -> Answer<Vec<SectionInfo>> {
    blocking(move || host.inspect(&name)).await
}

/// What a micro guest says about itself
#[utoipa::path(get, path = "/v1/vms/{name}/guest", params(("name" = String, Path)),
    responses((status = 200, body = GuestReport), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)))]
async fn show_guest(State(host): Of, Path(name): Path<String>) -> Answer<GuestReport> {
    blocking(move || host.guest(&name)).await
}

/// Give a micro guest a command
#[utoipa::path(post, path = "/v1/vms/{name}/command", params(("name" = String, Path)),
    request_body = CommandBody,
    responses((status = 200, body = Done), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)))]
async fn command_guest(
    State(host): Of,
    Path(name): Path<String>,
    Body(body): Body<CommandBody>,
) -> Answer<Done> {
    blocking(move || host.command(&name, body.kind).map(|()| Done {})).await
}

/// Have a guest give up memory, or take it back
#[utoipa::path(put, path = "/v1/vms/{name}/balloon", params(("name" = String, Path)),
    request_body = BalloonBody,
    responses((status = 200, body = VmInfo), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)))]
async fn set_balloon(
    State(host): Of,
    Path(name): Path<String>,
    Body(body): Body<BalloonBody>,
) -> Answer<VmInfo> {
    blocking(move || host.set_balloon(&name, body.target_bytes)).await
}

/// Start to move a virtual machine to another host
#[utoipa::path(post, path = "/v1/vms/{name}/migrate", params(("name" = String, Path)),
    request_body = MigrateBody,
    responses((status = 200, body = MigrateAnswer), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)))]
async fn migrate_vm(
    State(host): Of,
    Path(name): Path<String>,
    Body(body): Body<MigrateBody>,
) -> Answer<MigrateAnswer> {
    blocking(move || {
        let id = host.migrate(&name, &body)?;
        Ok(MigrateAnswer { id: id.to_string() })
    })
    .await
}

/// Ask a target whether it would take a virtual machine, and estimate each technique; nothing is moved
#[utoipa::path(post, path = "/v1/vms/{name}/preflight", params(("name" = String, Path)),
    request_body = MigrateBody,
    responses((status = 200, body = PreflightInfo), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)))]
async fn preflight_vm(
    State(host): Of,
    Path(name): Path<String>,
    Body(body): Body<MigrateBody>,
) -> Answer<PreflightInfo> {
    blocking(move || host.preflight(&name, &body)).await
}

/// Migrations away from this host, oldest first
#[utoipa::path(get, path = "/v1/migrations", responses((status = 200, body = Vec<MigrationInfo>)))]
async fn list_migrations(State(host): Of) -> Answer<Vec<MigrationInfo>> {
    blocking(move || Ok(host.migrations())).await
}

/// How long to wait for an answer.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct WaitQuery {
    /// Answer when the migration is over, at the latest after this time (at most 10 s count).
    #[serde(default)]
    wait_ms: u64,
}

/// One migration
#[utoipa::path(get, path = "/v1/migrations/{id}", params(("id" = String, Path), WaitQuery),
    responses((status = 200, body = MigrationInfo), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)))]
async fn show_migration(
    State(host): Of,
    Path(id): Path<String>,
    Query(query): Query<WaitQuery>,
) -> Answer<MigrationInfo> {
    blocking(move || host.migration(&id, Duration::from_millis(query.wait_ms))).await
}

/// Change technique and limits of a running migration
#[utoipa::path(patch, path = "/v1/migrations/{id}", params(("id" = String, Path)),
    request_body = LimitsPatch,
    responses((status = 200, body = MigrationInfo), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)))]
async fn set_limits(
    State(host): Of,
    Path(id): Path<String>,
    Body(patch): Body<LimitsPatch>,
) -> Answer<MigrationInfo> {
    blocking(move || host.set(&id, &patch)).await
}

/// End a migration; the guest runs on here
#[utoipa::path(post, path = "/v1/migrations/{id}/abort", params(("id" = String, Path)),
    responses((status = 200, body = Done), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)))]
async fn abort_migration(State(host): Of, Path(id): Path<String>) -> Answer<Done> {
    blocking(move || host.abort(&id).map(|()| Done {})).await
}

/// Decide, as its operator, how a migration away or to this host ended that nobody can be asked about
#[utoipa::path(post, path = "/v1/migrations/{id}/resolve", params(("id" = String, Path)),
    request_body = ResolveBody,
    responses((status = 200, body = Done), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)))]
async fn resolve_migration(
    State(host): Of,
    Path(id): Path<String>,
    Body(body): Body<ResolveBody>,
) -> Answer<Done> {
    blocking(move || host.resolve(&id, body.word).map(|()| Done {})).await
}

/// Migrations to this host that are under way
#[utoipa::path(get, path = "/v1/incoming", responses((status = 200, body = Vec<IncomingInfo>)))]
async fn list_incoming(State(host): Of) -> Answer<Vec<IncomingInfo>> {
    blocking(move || Ok(host.incoming())).await
}

/// This document
#[utoipa::path(get, path = "/v1/openapi.json", responses((status = 200, body = Object)))]
async fn show_openapi() -> Json<OpenApi> {
    Json(openapi())
}

/// Does what may wait for a VM process or a lock away from the connections' thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> Answer<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(answer) => answer.map(Json),
        Err(error) => Err(Refusal::failed(format!(
            "the daemon failed at this request ({error}): its log says more"
        ))),
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = match self.kind {
            ErrorKind::BadRequest => StatusCode::BAD_REQUEST,
            ErrorKind::NotFound => StatusCode::NOT_FOUND,
            ErrorKind::Conflict => StatusCode::CONFLICT,
            ErrorKind::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let body = ErrorBody {
            error: self.message,
            kind: self.kind,
        };
        (status, Json(body)).into_response()
    }
}

/// A JSON body whose errors are refusals like any other.
#[derive(FromRequest)]
#[from_request(via(Json), rejection(Refusal))]
struct Body<T>(T);

impl From<JsonRejection> for Refusal {
    fn from(rejection: JsonRejection) -> Self {
        Self::bad_request(rejection.body_text())
    }
}

/// A query whose errors are refusals like any other.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Query), rejection(Refusal))]
struct Query<T>(T);

impl From<QueryRejection> for Refusal {
    fn from(rejection: QueryRejection) -> Self {
        Self::bad_request(rejection.body_text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `docs/openapi.json` is made from the code: this writes it with `UPDATE_GOLDEN=1`.
    #[test]
    fn the_document_in_the_project_is_that_of_the_code() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/openapi.json");
        let text = serde_json::to_string_pretty(&openapi()).unwrap() + "\n";
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(path, &text).unwrap();
        }
        let golden = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            golden == text,
            "docs/openapi.json is out of date: UPDATE_GOLDEN=1 cargo test -p limosa-host"
        );
    }

    #[test]
    fn every_route_says_what_it_answers() {
        let document = serde_json::to_value(openapi()).unwrap();
        let paths = document["paths"].as_object().unwrap();
        assert_eq!(paths.len(), 15);
        for (path, methods) in paths {
            for (method, route) in methods.as_object().unwrap() {
                assert!(route["summary"].is_string(), "{method} {path}");
                assert!(route["responses"]["200"].is_object(), "{method} {path}");
            }
        }
    }
}
