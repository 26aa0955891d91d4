//! Tests of the plane alone, with the time passed in: expiry at the exact time, token grace periods, and bounds.
//! Random calls check the invariants.

use std::time::Duration;

use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;

fn at(ms: u64) -> Timestamp {
    Timestamp::UNIX_EPOCH + Duration::from_millis(ms)
}

fn plane(config: Config) -> Plane {
    Plane::new(Arc::new(config), Uuid::nil(), Uuid::nil())
}

/// 100 ms leases; domain tokens of 80 ms, renewed after 40 ms, with 20 ms of grace.
fn fast() -> Config {
    let ms = Duration::from_millis;
    Config {
        lease_ttl: ms(100),
        domain_token_ttl: ms(80),
        domain_token_renew_after: ms(40),
        domain_token_grace: ms(20),
        ..Config::default()
    }
}

fn node(id: u128, capabilities: &[&str]) -> Node {
    Node {
        id: Uuid::from_u128(id),
        wallet: "0x0".into(),
        version: "1".into(),
        capabilities: capabilities.iter().map(|name| Arc::from(*name)).collect(),
        seen_at: at(0),
    }
}

fn add(plane: &mut Plane, stages: &[(&str, &str)], edges: &[(&str, &str)], max_attempts: u32, now: u64) -> Uuid {
    let tasks: Vec<Value> = stages
        .iter()
        .map(|(stage, capability)| {
            json!({"label": "t", "stage": stage, "capability": capability, "max_attempts": max_attempts})
        })
        .collect();
    let edges: Vec<Value> = edges.iter().map(|(from, to)| json!({"from": from, "to": to})).collect();
    let body = json!({"domain_id": Uuid::nil(), "label": "j", "tasks": tasks, "edges": edges});
    let request = jobs::parse(body, Uuid::nil()).unwrap_or_else(|err| panic!("{err:?}"));
    plane.create(request, None, at(now)).expect("no key")
}

fn lease(plane: &mut Plane, node: &Node, now: u64) -> Option<Granted> {
    plane.lease(node, &[], None, at(now)).expect("not busy")
}

fn heartbeat(plane: &mut Plane, task: Uuid, node: &Node, now: u64) -> Result<HeartbeatAnswer, CallRefusal> {
    plane.heartbeat(task, node.id, Value::Null, Vec::new(), at(now))
}

fn word(plane: &mut Plane, job: Uuid, now: u64) -> String {
    let job = plane.job(job, at(now)).expect("known");
    job["tasks"]
        .as_array()
        .expect("tasks")
        .iter()
        .map(|task| task["status"].as_str().expect("a word"))
        .collect::<Vec<_>>()
        .join(" ")
}

#[test]
fn heartbeat_extends_lease_and_expired_task_is_requeued() {
    let mut plane = plane(fast());
    let (one, two) = (node(1, &["/a"]), node(2, &["/a"]));
    let job = add(&mut plane, &[("s", "/a")], &[], 3, 0);
    let task = lease(&mut plane, &one, 0).expect("work").task;
    assert!(lease(&mut plane, &two, 99).is_none());
    assert!(
        matches!(heartbeat(&mut plane, task, &one, 99), Ok(HeartbeatAnswer::Extended { expires, .. }) if expires == at(199))
    );
    assert!(lease(&mut plane, &two, 198).is_none());
    let again = lease(&mut plane, &two, 199).expect("the lease has expired");
    assert_eq!((again.task, again.attempts), (task, 2));
    assert_eq!(heartbeat(&mut plane, task, &one, 199), Err(CallRefusal::NotHeld));
    assert_eq!(word(&mut plane, job, 199), "leased");
    assert_eq!((plane.held(one.id, at(199)), plane.held(two.id, at(199))), (0, 1));
}

#[test]
fn replaced_token_is_valid_until_grace_or_expiry() {
    let mut plane = plane(fast());
    let one = node(1, &["/a"]);
    add(&mut plane, &[("s", "/a")], &[], 3, 0);
    let task = lease(&mut plane, &one, 0).expect("work").task;
    assert!(matches!(heartbeat(&mut plane, task, &one, 39), Ok(HeartbeatAnswer::Extended { token: None, .. })));
    let renewed = Some(NewToken { serial: 1, expires: at(120) });
    assert_eq!(
        heartbeat(&mut plane, task, &one, 40),
        Ok(HeartbeatAnswer::Extended { expires: at(140), token: renewed })
    );
    let mut open = |serial: u64, now: u64| plane.admit(task, serial, at(now)) == Admission::Open;
    assert!(open(0, 59) && open(1, 59));
    assert!(!open(0, 60), "the grace is over");
    assert!(open(1, 119));
    assert!(!open(2, 60), "this token was never issued");
    // The rejection above requests a newer token early.
    assert!(matches!(
        heartbeat(&mut plane, task, &one, 61),
        Ok(HeartbeatAnswer::Extended { token: Some(NewToken { serial: 2, .. }), .. })
    ));
    plane.complete(task, one.id, Vec::new(), Value::Null, at(62)).expect("held");
    assert_eq!(plane.admit(task, 2, at(63)), Admission::Closed, "no lease, no access");
}

#[test]
fn token_of_earlier_lease_is_rejected() {
    let mut plane = plane(Config { domain_token_ttl: Duration::from_secs(60), ..fast() });
    let one = node(1, &["/a"]);
    add(&mut plane, &[("s", "/a")], &[], 3, 0);
    let first = lease(&mut plane, &one, 0).expect("work");
    assert_eq!(plane.admit(first.task, first.token.serial, at(99)), Admission::Open);
    assert_eq!(plane.admit(first.task, first.token.serial, at(100)), Admission::Closed, "the lease has expired");
    let second = lease(&mut plane, &one, 100).expect("re-queued");
    assert_eq!(plane.admit(second.task, first.token.serial, at(101)), Admission::Closed);
    assert_eq!(plane.admit(second.task, second.token.serial, at(101)), Admission::Open);
}

#[test]
fn events_are_limited_and_new_attempt_resets_progress() {
    let mut plane = plane(fast());
    let one = node(1, &["/a"]);
    let job = add(&mut plane, &[("s", "/a")], &[], 3, 0);
    let task = lease(&mut plane, &one, 0).expect("work").task;
    let events: Vec<Value> = (0..EVENTS_MAX + 5).map(|n| json!(n)).collect();
    plane.heartbeat(task, one.id, json!({"pct": 1}), events, at(1)).expect("held");
    let seen = plane.job(job, at(2)).expect("known");
    let kept = seen["tasks"][0]["meta"]["events"].as_array().expect("events").clone();
    assert_eq!((kept.len(), &kept[0]), (EVENTS_MAX, &json!(5)));
    plane.fail(task, one.id, Value::Null, true, at(3)).expect("held");
    lease(&mut plane, &one, 4).expect("re-queued");
    assert_eq!(plane.job(job, at(5)).expect("known")["tasks"][0]["meta"]["progress"], Value::Null);
}

#[test]
fn expired_lease_of_cancelled_task_is_not_requeued() {
    let mut plane = plane(fast());
    let one = node(1, &["/a"]);
    let job = add(&mut plane, &[("s", "/a"), ("t", "/a")], &[("s", "t")], 3, 0);
    lease(&mut plane, &one, 0).expect("work");
    assert!(plane.cancel(job, at(1)).is_some());
    assert_eq!(word(&mut plane, job, 2), "leased canceled");
    assert_eq!(word(&mut plane, job, 100), "canceled canceled");
    assert!(lease(&mut plane, &one, 101).is_none());
    assert_eq!(plane.cancel(Uuid::from_u128(9), at(1)), None);
}

#[test]
fn completion_before_cancel_delivery_is_accepted() {
    let mut plane = plane(fast());
    let one = node(1, &["/a"]);
    let job = add(&mut plane, &[("s", "/a"), ("s", "/a")], &[], 3, 0);
    let (first, second) =
        (lease(&mut plane, &one, 0).expect("work").task, lease(&mut plane, &one, 0).expect("work").task);
    plane.cancel(job, at(1));
    plane.complete(first, one.id, vec!["d".to_owned()], Value::Null, at(2)).expect("held");
    plane.fail(second, one.id, Value::Null, true, at(2)).expect("held");
    assert_eq!(word(&mut plane, job, 3), "completed canceled");
    assert_eq!(plane.job_status(job), Some("canceled"));
}

/// Two nodes and an author make random calls. After each call, counts, queues and expiries agree with the tasks'
/// states. No task is leased twice at once, and attempts stay within their bound. In the end every job ends.
#[test]
fn random_calls_keep_the_invariants() {
    for seed in 0..60 {
        let mut random = StdRng::seed_from_u64(seed);
        let mut plane = plane(Config { leases_per_node: Some(4), finished_tasks_max: 20, ..fast() });
        let nodes = [node(1, &["/a", "/b"]), node(2, &["/b"])];
        let mut held: Vec<(Uuid, usize)> = Vec::new();
        let mut jobs = Vec::new();
        let mut now = 0;
        for _ in 0..400 {
            now += random.random_range(0..30);
            let who = random.random_range(0..2_usize);
            let pick = (!held.is_empty()).then(|| held[random.random_range(0..held.len())]);
            match (random.random_range(0..8), pick) {
                (0, _) => {
                    let stages = [("s", "/a"), ("s", "/b"), ("t", "/b"), ("u", "/a")];
                    let edges = [("s", "t"), ("t", "u")];
                    jobs.push(add(&mut plane, &stages, &edges, random.random_range(1..3), now));
                }
                (1, _) if !jobs.is_empty() => {
                    plane.cancel(jobs[random.random_range(0..jobs.len())], at(now));
                }
                (2 | 3, _) => {
                    if let Ok(Some(granted)) = plane.lease(&nodes[who], &[], None, at(now)) {
                        held.push((granted.task, who));
                    }
                }
                (4, Some((task, _))) => drop(heartbeat(&mut plane, task, &nodes[who], now)),
                (5 | 6, Some((task, by))) => {
                    drop(plane.complete(task, nodes[by].id, Vec::new(), Value::Null, at(now)));
                }
                (7, Some((task, _))) => drop(plane.fail(task, nodes[who].id, Value::Null, true, at(now))),
                _ => {}
            }
            check_invariants(&mut plane, &nodes, now);
        }
        // No more calls of the two nodes. Leases expire, and one reliable node finishes the rest.
        let reliable = node(3, &["/a", "/b"]);
        now += 1000;
        while let Some(granted) = lease(&mut plane, &reliable, now) {
            plane.complete(granted.task, reliable.id, Vec::new(), Value::Null, at(now)).expect("held");
            check_invariants(&mut plane, &nodes, now);
        }
        for job in jobs {
            let status = plane.job_status(job);
            assert!(!matches!(status, Some("pending" | "running")), "seed {seed}: {status:?}");
        }
        assert!(plane.tasks.len() <= 24, "old ended jobs are dropped");
    }
}

fn check_invariants(plane: &mut Plane, nodes: &[Node], now: u64) {
    plane.expire(at(now));
    let queued: usize = plane.ready.values().map(BTreeSet::len).sum();
    let ready = plane.tasks.values().filter(|task| matches!(task.state, State::Ready)).count();
    assert_eq!(queued, ready);
    let held: Vec<Uuid> = plane
        .tasks
        .values()
        .filter_map(|task| if let State::Held(hold) = &task.state { Some(hold.node) } else { None })
        .collect();
    assert_eq!(plane.expiries.len(), held.len());
    for node in nodes {
        let count = held.iter().filter(|holder| **holder == node.id).count();
        assert_eq!(plane.slots.get(&node.id).map_or(0, |slot| slot.held), count);
    }
    for job in plane.jobs.values() {
        let mut counts = [0; 6];
        for task in &job.tasks {
            counts[plane.tasks[task].state.word() as usize] += 1;
        }
        assert_eq!(counts, job.counts);
    }
    for task in plane.tasks.values() {
        assert!(task.attempts <= task.request.max_attempts());
        let open = plane.deps_remaining(task) == 0;
        assert!(open || matches!(task.state, State::Blocked), "only blocked tasks wait for other tasks");
    }
    assert_eq!(plane.order.len(), plane.jobs.len());
}
