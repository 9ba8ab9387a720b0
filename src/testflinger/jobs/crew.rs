//! Those who wait for the network: a few threads that do what they are given, in any order.

use super::Trouble;
use super::store::{Ended, Job};
use super::work::Shop;
use crate::fault::Fault;
use crate::testflinger::client::{Error, Found};
use anyhow::{Context, Result};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

/// How many requests are under way at once.
pub(super) const WORKERS: usize = 8;

/// Asked of a worker; the number is a machine's.
pub(super) enum Task {
    Search(String),
    Send(usize, Box<Job>),
    Ask(usize, Box<Job>),
    Collect(usize, Box<Job>),
}

/// What came of it.
pub(super) enum Done {
    Found(Result<Vec<Found>, Error>),
    Sent(usize, Box<Job>, Result<(), Trouble>),
    Asked(usize, Result<Option<String>, Trouble>),
    Collected(usize, Result<Option<Ended>, Trouble>),
}

/// Starts them. They end when there is nobody left to give them tasks.
pub(super) fn employ(shop: &Arc<Shop>) -> Result<(Sender<Task>, Receiver<Done>)> {
    let (tasks, from_drive) = mpsc::channel();
    let (to_drive, done) = mpsc::channel();
    let from_drive = Arc::new(Mutex::new(from_drive));
    for number in 0..WORKERS {
        let (shop, from_drive, to_drive) = (Arc::clone(shop), Arc::clone(&from_drive), to_drive.clone());
        std::thread::Builder::new()
            .name(format!("jobs-{number}"))
            .spawn(move || work(&shop, &from_drive, &to_drive))
            .context(Fault::host("cannot start a thread"))?;
    }
    Ok((tasks, done))
}

fn work(shop: &Shop, tasks: &Mutex<Receiver<Task>>, done: &Sender<Done>) {
    loop {
        let task = tasks.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(task) = task else { return };
        let result = match task {
            Task::Search(tag) => Done::Found(shop.client.search([tag.as_str()])),
            Task::Send(index, mut job) => {
                let result = shop.send(&mut job);
                Done::Sent(index, job, result)
            }
            Task::Ask(index, job) => Done::Asked(index, shop.state(&job)),
            Task::Collect(index, job) => Done::Collected(index, shop.collect(&job)),
        };
        if done.send(result).is_err() {
            return;
        }
    }
}
