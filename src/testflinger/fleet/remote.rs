//! The job of a shard on the server: what it says, what it leaves behind, why it ended.

use super::each::AT_ONCE;
use super::harvest::{self, Artifacts, Log};
use super::lab::Trouble;
use crate::fault::{Fault, visible};
use crate::host;
use crate::record::files;
use crate::testflinger::client::{Client, Error};
use crate::testflinger::wire::{self, Phase, job_state};
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::io::{ErrorKind, Seek};
use std::path::Path;

/// A shard's artifacts, packed.
const LARGEST_ARTIFACTS: u64 = 2 << 30;

/// What the artifacts of a shard may take, packed; unpacked it is twice as much. Several are fetched at
/// once, and whatever hosts send, half of the disk's room is left after a round.
fn share(free: u64) -> u64 {
    LARGEST_ARTIFACTS.min(free / (2 * 3 * AT_ONCE as u64))
}

/// What is known of it.
#[derive(Debug, Default)]
pub(super) struct Job {
    pub(super) id: String,
    /// It was sent; the server may have it.
    pub(super) tried: bool,
    pub(super) log: Log,
    /// The first fragment that was not heard.
    fragment: u64,
}

impl Job {
    pub(super) fn new(id: &str, tried: bool) -> Self {
        Self { id: id.to_owned(), tried, ..Self::default() }
    }

    /// Hears what is new in its log; whether there is anything.
    ///
    /// A log that cannot be read is a silent one.
    pub(super) fn listen(&mut self, client: &Client) -> Result<bool, Trouble> {
        let parts = match client.log(&self.id, wire::Log::Output, self.fragment) {
            Ok(parts) => parts,
            Err(error) => return trouble_of_one(error).map(|_| false),
        };
        let mut next = self.fragment;
        for phase in Phase::ALL {
            let Some(part) = parts.get(&phase) else { continue };
            let Ok(last) = u64::try_from(part.last) else { continue };
            if last >= self.fragment {
                next = next.max(last.saturating_add(1));
                self.log.hear(&part.text);
            }
        }
        let any = next > self.fragment;
        self.fragment = next;
        Ok(any)
    }

    /// What it left, unpacked beside `place`; and why there is nothing, or not all of it: its host
    /// died, its test never ran, its artifacts cannot be had.
    pub(super) fn collect(&mut self, client: &Client, place: &Path) -> Result<(Artifacts, String), Trouble> {
        let free = place.parent().map_or(Ok(u64::MAX), host::free_disk).map_err(Trouble::Fatal)?;
        let artifacts = match self.fetch(client, place, share(free))? {
            Ok(Some(archive)) => harvest::unpack(archive, &place.with_extension("d"), 2 * share(free)),
            Ok(None) => Ok(Artifacts::default()),
            // It is as if there were none: what was heard still counts.
            Err(why) => Err(anyhow::anyhow!("its artifacts cannot be had: {why}")),
        };
        let (artifacts, spoilt) = match artifacts {
            Ok(artifacts) => (artifacts, None),
            Err(error) => (Artifacts::default(), Some(format!("{error:#}"))),
        };
        let mut why = String::new();
        if artifacts.ended.is_none() {
            self.listen(client)?;
            why = spoilt.map_or_else(|| self.why(client), Ok)?;
        }
        Ok((artifacts, why))
    }

    /// Its artifacts, if it has any, or why they cannot be had.
    fn fetch(
        &self,
        client: &Client,
        place: &Path,
        most: u64,
    ) -> Result<Result<Option<File>, String>, Trouble> {
        let open = || -> Result<File> {
            let path = place.with_extension("tar.gz");
            files::remove(&path)?;
            fs::remove_dir_all(place.with_extension("d")).or_else(|error| match error.kind() {
                ErrorKind::NotFound => Ok(()),
                _ => Err(error),
            })?;
            let file = File::options().read(true).write(true).create_new(true).open(&path);
            file.with_context(|| files::cannot("make", &path))
        };
        let mut file = open().map_err(Trouble::Fatal)?;
        match client.fetch_artifacts(&self.id, &mut file, most) {
            Ok(true) => {
                let rewound = file.rewind().context(Fault::host("cannot read artifacts"));
                rewound.map(|()| Ok(Some(file))).map_err(Trouble::Fatal)
            }
            Ok(false) => Ok(Ok(None)),
            Err(error) => trouble_of_one(error).map(Err),
        }
    }

    /// Why it ended without having run its scenarios to their end.
    fn why(&self, client: &Client) -> Result<String, Trouble> {
        let result = match client.result(&self.id, 0) {
            Ok(Some(result)) => result,
            Ok(None) => return Ok("the server forgot its job".into()),
            Err(error) => return trouble_of_one(error),
        };
        let failed = result.phases.iter().find_map(|(phase, result)| {
            let status = result.status.filter(|status| *status != 0)?;
            Some(format!("its {phase} phase ended with status {status}"))
        });
        let why = match failed {
            Some(why) => why,
            None if result.state == job_state::CANCELLED => "its job was cancelled".into(),
            None if result.phases.get(&Phase::Test).is_none_or(|test| test.status.is_none()) => {
                "its job ended without a test phase".into()
            }
            None => "its job ended without the end of its scenarios".into(),
        };
        let last = self.log.last_words.trim().lines().last().unwrap_or_default();
        Ok(if last.is_empty() { why } else { format!("{why} ({})", visible(last)) })
    }
}

/// What is wrong with one job is no trouble of the others; what is wrong with us or the server is.
fn trouble_of_one(error: Error) -> Result<String, Trouble> {
    if error.is_passing() || matches!(error.status(), Some(401 | 403)) || matches!(error, Error::Here { .. })
    {
        return Err(trouble(error));
    }
    Ok(format!("{:#}", anyhow::Error::new(error)))
}

pub(super) fn trouble(error: Error) -> Trouble {
    let passes = error.is_passing();
    let error = anyhow::Error::new(error);
    if passes { Trouble::Away(format!("{error:#}")) } else { Trouble::Fatal(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_round_of_artifacts_fills_the_disk() {
        assert_eq!(share(u64::MAX), LARGEST_ARTIFACTS);
        for free in [0, 1000, 10 << 30, 90 << 30] {
            assert!(3 * share(free) * AT_ONCE as u64 <= free / 2, "{free}");
        }
    }
}
