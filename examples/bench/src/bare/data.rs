//! Downloads one object to a file and uploads it again in parts. Two parts are sent at a time, as in a node.

use std::{
    convert::Infallible,
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    path::PathBuf,
    pin::Pin,
    task::{Context as Waker, Poll},
    time::Instant,
};

use anyhow::Context;
use bytes::Bytes;
use futures_util::future::try_join_all;
use http::Method;
use http_body_util::{BodyExt, Either, Full};
use hyper::body::{Body, Frame, SizeHint};
use serde_json::{Value, json};
use url::Url;

use super::Wire;

/// Bytes read from the file at once.
const BLOCK_BYTES: usize = 256 * 1024;
/// Concurrent parts.
const PARALLEL: usize = 2;

/// The location of the data.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Base URL of the dev server
    dev_server: Url,
    /// The domain
    domain: String,
    /// The file to download to
    file: PathBuf,
}

/// The open connections.
pub(super) struct Client {
    wires: Vec<Wire<Either<Full<Bytes>, Part>>>,
    data: String,
    file: PathBuf,
    copies: usize,
}

impl Client {
    pub(super) async fn connect(args: &Args) -> anyhow::Result<Self> {
        // Other users can read a command line, so the secret is in the environment.
        let grant = std::env::var("BENCH_GRANT").context("BENCH_GRANT is not set")?;
        let mut wires = Vec::new();
        for _ in 0..PARALLEL {
            wires.push(Wire::open(&args.dev_server, &grant).await?);
        }
        let data = format!("/api/v1/domains/{}/data", args.domain);
        Ok(Self { wires, data, file: args.file.clone(), copies: 0 })
    }

    /// Copies the object `id` and returns the time that took, in nanoseconds.
    pub(super) async fn copy(&mut self, id: &str) -> anyhow::Result<String> {
        let began = Instant::now();
        let size = self.download(id).await?;
        self.upload(size).await?;
        std::fs::remove_file(&self.file)?;
        Ok(began.elapsed().as_nanos().to_string())
    }

    async fn download(&mut self, id: &str) -> anyhow::Result<u64> {
        let path = format!("{}/{id}?raw=true", self.data);
        let response = self.wires[0].send(Method::GET, &path, small("")).await?;
        anyhow::ensure!(response.status().is_success(), "{path}: {}", response.status());
        let (mut file, mut body, mut size) = (File::create(&self.file)?, response.into_body(), 0);
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame?.into_data() {
                size += data.len() as u64;
                file.write_all(&data)?;
            }
        }
        Ok(size)
    }

    async fn upload(&mut self, size: u64) -> anyhow::Result<()> {
        self.copies += 1;
        let name = format!("bare-{}", self.copies);
        let begin =
            json!({ "name": name, "data_type": "bin", "size": size, "content_type": "application/octet-stream" });
        let path = format!("{}/multipart?uploads", self.data);
        let begun: Value = json_of(&self.wires[0].call(Method::POST, &path, small(&begin.to_string())).await?)?;
        let upload = begun["upload_id"].as_str().context("no upload was begun")?.to_owned();
        let part_size = begun["part_size"].as_u64().filter(|size| *size > 0).context("no part size was named")?;
        let (data, file, count) = (&self.data, &self.file, size.div_ceil(part_size));
        let lanes = self.wires.iter_mut().zip(1..).map(|(wire, first)| {
            let upload = &upload;
            async move {
                let mut sent = Vec::new();
                for number in (first..=count).step_by(PARALLEL) {
                    let offset = (number - 1) * part_size;
                    let part = Part::open(file, offset, part_size.min(size - offset))?;
                    let path = format!("{data}/multipart?uploadId={upload}&partNumber={number}");
                    let answer: Value = json_of(&wire.call(Method::PUT, &path, Either::Right(part)).await?)?;
                    sent.push(json!({ "part_number": number, "etag": answer["etag"] }));
                }
                anyhow::Ok(sent)
            }
        });
        let mut parts: Vec<Value> = try_join_all(lanes).await?.into_iter().flatten().collect();
        parts.sort_by_key(|part| part["part_number"].as_u64());
        let path = format!("{}/multipart?uploadId={upload}", self.data);
        self.wires[0].call(Method::POST, &path, small(&json!({ "parts": parts }).to_string())).await?;
        Ok(())
    }
}

fn small(text: &str) -> Either<Full<Bytes>, Part> {
    Either::Left(Full::new(Bytes::copy_from_slice(text.as_bytes())))
}

fn json_of(bytes: &[u8]) -> anyhow::Result<Value> {
    serde_json::from_slice(bytes).context("read an answer")
}

/// A range of a file as a body, read while it is sent. The file is in the page cache. No other task uses this thread.
pub(super) struct Part {
    file: File,
    left: u64,
}

impl Part {
    fn open(path: &PathBuf, offset: u64, left: u64) -> anyhow::Result<Self> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(offset))?;
        Ok(Self { file, left })
    }
}

impl Body for Part {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Waker<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        let mut block = vec![0; self.left.min(BLOCK_BYTES as u64) as usize];
        self.file.read_exact(&mut block).expect("the file was written a moment ago");
        self.left -= block.len() as u64;
        Poll::Ready(Some(Ok(Frame::data(block.into()))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
