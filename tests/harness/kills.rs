//! `kill -9` of a test binary at random moments: no machine survives it, the ledger stays sound, and
//! the next run is green and leaves nothing of the dead one behind.

use super::support::{Place, boot_sector, finish};
use shakedown::record::Outcome;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// Kills runs of `arguments` at moments spread over the time that a whole run takes, each of them in
/// a place as `prepare` leaves it. `SEED` repeats the moments of another round.
fn kill_at_random(place: &Place, run: &dyn Fn() -> Command, kills: u32, prepare: &dyn Fn(u32)) {
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
    let mut random = Random(seed.unwrap_or_else(|| RandomState::new().build_hasher().finish()));
    println!("SEED={}", random.0);
    let green = |when: &str| {
        let begun = Instant::now();
        let ended = finish(run());
        assert_eq!(ended.code, Some(0), "{when}: {ended:?}");
        place.is_tidy();
        begun.elapsed()
    };
    green("the first run, which makes what later ones find");
    let whole = green("a run without kill");
    println!("a whole run takes {whole:.2?}");
    for kill in 0..kills {
        prepare(kill);
        // One moment in each slice of the run, so that few kills are spread over it too.
        let moment = whole.mul_f64((f64::from(kill) + random.fraction()) / f64::from(kills));
        let mut child = run().spawn().expect("starts");
        std::thread::sleep(moment);
        child.kill().and_then(|()| child.wait()).expect("is killed");
        place.is_deserted();
        println!("killed after {moment:.2?}: {}", last_events(&place.path("notes/latest")));
        green(&format!("after a kill at {moment:?}"));
        // Looks at every line.
        let passed = place.records().iter().filter(|record| record.outcome == Outcome::Passed).count();
        assert!(passed >= 3 + kill as usize, "{passed} passed");
    }
    place.is_deserted();
}

/// The last events of a run's scenarios: what it was at.
fn last_events(run: &Path) -> String {
    let mut words = Vec::new();
    for entry in std::fs::read_dir(run).into_iter().flatten().flatten() {
        let events = std::fs::read_to_string(entry.path().join("events.jsonl")).unwrap_or_default();
        let last =
            events.lines().last().and_then(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        if let Some(event) = last {
            words.push(format!("{} {}", entry.file_name().to_string_lossy(), event["event"]));
        }
    }
    words.join(", ")
}

/// SplitMix64: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014.
struct Random(u64);

impl Random {
    /// At least 0, below 1.
    fn fraction(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[test]
fn three_kills_leave_nothing() {
    let place = Place::new();
    let image = place.path("disk.img");
    boot_sector(&image, "Loading...\r\n");
    std::fs::write(place.path("disk.img.toml"), "login = false").expect("writes");
    let run = || {
        let mut command = place.command("machines", &["--exact", "boots"]);
        command.env("SHAKEDOWN_IMAGE", &image);
        command
    };
    kill_at_random(&place, &run, 3, &|_| ());
}

#[test]
#[ignore = "takes minutes; the nightly workflow runs it"]
fn twenty_kills_of_real_machines_leave_nothing() {
    let place = Place::with_linked_images();
    let run = || place.command("machines", &["-m", "not(any(broken, nightly))", "--skip", "flake"]);
    kill_at_random(&place, &run, 20, &|kill| {
        // Every other run has its template to make first.
        if kill.is_multiple_of(2) {
            std::fs::remove_dir_all(place.path("cache/templates")).expect("removes");
        }
    });
}
