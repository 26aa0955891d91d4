//! The author's calls to the dev server: jobs, data and the request journal.

use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use http::{Method, Request, header};
use http_body_util::BodyExt;
use jiff::Timestamp;
use runner_host::transport::{self, Client};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use url::Url;

use crate::procs::DevServer;

/// Limit of one call.
const LIMIT: Duration = Duration::from_secs(60);

/// An author with a grant.
pub(crate) struct Author {
    runtime: Runtime,
    client: Client,
    base: Url,
    domain: String,
    pub(crate) grant: String,
}

/// The times of an ended job, by the dev server's clock.
pub(crate) struct Ended {
    /// First heartbeat to last report.
    pub(crate) took: Duration,
}

impl Author {
    pub(crate) fn new(dev_server: &DevServer) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = Client::new(transport::Config::default());
        let mut author = Self {
            runtime,
            client,
            base: dev_server.base.clone(),
            domain: dev_server.domain.to_string(),
            grant: String::new(),
        };
        let info = author.call(Method::GET, "/dev/v1/world", None)?;
        author.grant = info["grant"].as_str().context("the dev server gave no grant")?.to_owned();
        Ok(author)
    }

    fn call(&self, method: Method, path: &str, body: Option<Bytes>) -> anyhow::Result<Value> {
        let url = self.base.join(path)?;
        let request = Request::builder()
            .method(&method)
            .uri(url.as_str())
            .header(header::AUTHORIZATION, format!("Bearer {}", self.grant))
            .header(header::ACCEPT, "application/json")
            .header(header::CONTENT_TYPE, "application/json")
            .body(transport::full(body.unwrap_or_default()))?;
        self.runtime.block_on(async {
            let response = self.client.send(request, LIMIT).await?;
            let status = response.status();
            // The job may be larger than the node's own limit for answers.
            let body = response.into_body().collect().await?.to_bytes();
            anyhow::ensure!(status.is_success(), "{method} {path}: {status}: {}", transport::excerpt(&body));
            serde_json::from_slice(&body).with_context(|| format!("{method} {path}"))
        })
    }

    /// Creates a job of `count` equal tasks and returns its id.
    pub(crate) fn create(&self, capability: &str, inputs: &[&str], count: usize) -> anyhow::Result<String> {
        let task = json!({ "label": "bench", "stage": "bench", "capability": capability, "inputs_cids": inputs });
        let job = json!({ "domain_id": self.domain, "label": "bench", "tasks": vec![task; count] });
        let made = self.call(Method::POST, "/v1/jobs", Some(job.to_string().into()))?;
        Ok(made["job_id"].as_str().context("the dev server gave no job id")?.to_owned())
    }

    /// Waits until the newest job, which must be `job`, is complete. Polls at intervals of `pause`.
    pub(crate) fn wait(&self, job: &str, pause: Duration, limit: Duration) -> anyhow::Result<()> {
        let began = Instant::now();
        loop {
            let newest = self.newest(job)?;
            match newest["job"]["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("pending" | "running") => {}
                other => anyhow::bail!("the job ended as {other:?}: {}", newest["tasks_summary"]),
            }
            let summary = &newest["tasks_summary"];
            anyhow::ensure!(began.elapsed() < limit, "the job takes longer than {limit:?}: {summary}");
            std::thread::sleep(pause);
        }
    }

    /// Waits until every task of the newest job, which must be `job`, is running.
    pub(crate) fn wait_running(&self, job: &str, tasks: usize, limit: Duration) -> anyhow::Result<()> {
        let began = Instant::now();
        loop {
            let newest = self.newest(job)?;
            let summary = &newest["tasks_summary"];
            if summary["running"] == tasks {
                return Ok(());
            }
            anyhow::ensure!(began.elapsed() < limit, "not all of {tasks} tasks run after {limit:?}: {summary}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The summary of the newest job, which must be `job`.
    fn newest(&self, job: &str) -> anyhow::Result<Value> {
        let mut page = self.call(Method::GET, "/v1/jobs?limit=1", None)?;
        let newest = page["items"][0].take();
        anyhow::ensure!(newest["job"]["id"] == job, "another job came in between");
        Ok(newest)
    }

    /// The start and the duration of an ended job.
    pub(crate) fn times(&self, job: &str) -> anyhow::Result<Ended> {
        let job = self.call(Method::GET, &format!("/v1/jobs/{job}"), None)?;
        let tasks = job["tasks"].as_array().context("the job has no tasks")?;
        let all = |field: &str| {
            let times = tasks.iter().filter_map(|task| task[field].as_str()?.parse::<Timestamp>().ok());
            times.collect::<Vec<_>>()
        };
        let first_heartbeat = all("last_heartbeat_at").into_iter().min().context("no task had a heartbeat")?;
        let last = all("updated_at").into_iter().max().context("no task has ended")?;
        let took = Duration::try_from(last.duration_since(first_heartbeat)).unwrap_or_default();
        Ok(Ended { took })
    }

    /// Stores an object of `size` bytes in parts and returns its id.
    pub(crate) fn store(&self, name: &str, size: u64) -> anyhow::Result<String> {
        let uploads = format!("/api/v1/domains/{}/data/multipart", self.domain);
        let object =
            json!({ "name": name, "data_type": "bin", "size": size, "content_type": "application/octet-stream" });
        let begun = self.call(Method::POST, &format!("{uploads}?uploads"), Some(object.to_string().into()))?;
        let id = begun["upload_id"].as_str().context("the dev server began no upload")?;
        let part_size = begun["part_size"].as_u64().context("the dev server named no part size")?;
        let block: Vec<u8> = (0..part_size).scan(1_u32, |state, _| Some(noise(state))).collect();
        let block = Bytes::from(block);
        let mut parts = Vec::new();
        for number in 1..=size.div_ceil(part_size) {
            let length = part_size.min(size - (number - 1) * part_size);
            let path = format!("{uploads}?uploadId={id}&partNumber={number}");
            let part = self.call(Method::PUT, &path, Some(block.slice(..length as usize)))?;
            parts.push(json!({ "part_number": number, "etag": part["etag"] }));
        }
        let parts = json!({ "parts": parts }).to_string();
        let stored = self.call(Method::POST, &format!("{uploads}?uploadId={id}"), Some(parts.into()))?;
        Ok(stored["id"].as_str().context("the dev server stored nothing")?.to_owned())
    }

    /// Ids and sizes of everything stored.
    pub(crate) fn stored(&self) -> anyhow::Result<Vec<(String, u64)>> {
        let listed = self.call(Method::GET, &format!("/api/v1/domains/{}/data", self.domain), None)?;
        let items = listed["data"].as_array().context("the dev server listed nothing")?;
        let item = |item: &Value| Some((item["id"].as_str()?.to_owned(), item["size"].as_u64()?));
        Ok(items.iter().filter_map(item).collect())
    }

    pub(crate) fn delete(&self, id: &str) -> anyhow::Result<()> {
        self.call(Method::DELETE, &format!("/api/v1/domains/{}/data/{id}", self.domain), None).map(|_| ())
    }

    /// The number of the next request, and the number of polls for work since request number `since`.
    pub(crate) fn polls(&self, since: u64) -> anyhow::Result<(u64, usize)> {
        let journal = self.call(Method::GET, &format!("/dev/v1/requests?since={since}"), None)?;
        let requests = journal["requests"].as_array().context("the dev server has no journal")?;
        let polls = requests.iter().filter(|seen| seen["path"] == "/v1/tasks").count();
        Ok((journal["next"].as_u64().context("the dev server's journal has no end")?, polls))
    }
}

/// The next byte of a pseudo-random sequence (xorshift).
fn noise(state: &mut u32) -> u8 {
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    state.to_le_bytes()[0]
}
