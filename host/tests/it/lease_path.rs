//! A task's way through the node: leased, run, its artifacts stored, its end reported.

use serde_json::json;

use crate::harness::{Lab, fixtures};

#[tokio::test]
async fn s1_20_hello_reads_its_input_and_publishes_its_greeting() {
    let lab = Lab::start().await;
    let node = lab.joined(&[fixtures::hello()]).await;
    let input = lab.put("who", b"world").await;
    let job = lab.task("/examples/hello/v1").inputs(&[input]).set("outputs_prefix", json!("greetings")).submit();
    let ended = lab.ended(&node, job).await;
    ended.completed();
    assert_eq!(lab.artifact(&ended, "greetings/outputs/hello.bin").await, b"hello, world");
    println!("{:#}", ended.0);
    println!("{}", node.log());
    println!("{:#}", node.status().await);
}
