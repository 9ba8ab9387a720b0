//! `shakedown demo`: the main job, from a bare host to a scenario that ran.

use super::Verdict;
use super::doctor::Diagnosis;
use super::progress::Progress;
use super::project::Project;
use super::terminal::{self, Colour, Paint};
use anyhow::{Context, Result, ensure};
use shakedown::connection::Cmd;
use shakedown::deadline::human;
use shakedown::harness::{self, Body, Scenario, Settings};
use shakedown::record::event::Events;
use shakedown::record::{Environment, Outcome};
use shakedown::vm::{Boot, Bus, DiskNeed, Medium, Needs, Vm};
use std::io;
use std::time::{Duration, Instant};

/// The main job: check this host, install what is missing, build the boot image, boot it, run a
/// scenario on it, and show what came of it.
#[derive(clap::Args)]
pub(super) struct Demo {
    /// Install what is missing without asking
    #[arg(long, short)]
    yes: bool,
}

const MIB: u64 = 1 << 20;

static SCENARIO: Scenario = Scenario {
    name: "demo",
    markers: &["vm"],
    machine: Some(Needs {
        boot: Boot::Cold,
        medium: Medium::Cdrom,
        disks: &[
            DiskNeed { bytes: 512 * MIB, bus: Bus::Virtio },
            DiskNeed { bytes: 512 * MIB, bus: Bus::Virtio },
        ],
        ..Needs::DEFAULT
    }),
    timeout: None,
    ignore: None,
    file: file!(),
    line: line!(),
    body: Body::Vm(body),
};

/// What a first scenario might be: is the machine healthy, and does a mirror survive a lost disk?
fn body(vm: &mut Vm) -> Result<()> {
    let mut ssh = vm.ssh()?;
    let state = ssh.run(Cmd::new("systemctl is-system-running --wait").allow_failure())?;
    ensure!(state.trimmed() == "running", "the system is {}", state.trimmed());
    ssh.run(
        "mdadm --create /dev/md0 --run --level=1 --metadata=1.2 --raid-devices=2 /dev/vda /dev/vdb && \
         mkfs.ext4 -q /dev/md0 && mount /dev/md0 /mnt && echo survived > /mnt/file && sync",
    )?;
    ssh.run("mdadm /dev/md0 --fail /dev/vdb --remove /dev/vdb")?;
    let read = ssh.run("umount /mnt && mount /dev/md0 /mnt && cat /mnt/file")?;
    ensure!(read.trimmed() == "survived", "after the loss of a disk the mirror has {:?}", read.text());
    vm.screenshot("screen")?;
    vm.power_off()
}

impl Demo {
    pub(super) fn run(self) -> Result<Verdict> {
        let begun = Instant::now();
        let here = std::env::current_dir().context("cannot tell the current directory")?;
        let environment = Environment::read(&here)?;
        // Not this project's machine is shown, but ours.
        let ours = Project { environment: environment.clone(), settings: Settings::default() };
        let mut diagnosis = Diagnosis::make(ours)?;
        if !diagnosis.ok {
            diagnosis = diagnosis.treat(self.yes)?;
        }
        if !diagnosis.ok {
            terminal::print(&diagnosis.text(Paint::of(&io::stdout())))?;
            return Ok(Verdict::NotFine);
        }
        let host = begun.elapsed();
        let progress = Progress::new();
        let performance =
            harness::perform(environment, Settings::default(), &SCENARIO, Events::to(progress.clone()));
        progress.finish();
        let timings = &performance.timings;
        let seconds = |seconds: Option<f64>| {
            seconds.map_or_else(|| "-".to_owned(), |s| human(Duration::from_millis((s * 1000.0) as u64)))
        };
        let accelerator = diagnosis.accelerator.as_ref().map_or("-".to_owned(), |a| a.kind.to_string());
        let paint = Paint::of(&io::stdout());
        let (colour, verdict) = match performance.outcome {
            Outcome::Passed => (Colour::Green, Verdict::Fine),
            _ => (Colour::Red, Verdict::NotFine),
        };
        let mut text =
            format!("\nScenario `demo`: {}\n", paint.paint(colour, &performance.outcome.to_string()));
        if !performance.message.is_empty() {
            text += &format!("{}\n", performance.message);
        }
        text += "\n  A Debian ISO was booted from CD-ROM, a RAID 1 was made on two blank disks, one disk was taken\n  \
                 away, the file on it was read back, and the machine was powered off by its button.\n\n";
        for (what, took) in [
            ("host checked", human(round(host))),
            ("boot image", seconds(timings.build_seconds)),
            ("power-on to login prompt", seconds(timings.boot_to_login_seconds)),
            ("power-on to first SSH command", seconds(timings.boot_to_ssh_seconds)),
            ("whole scenario", seconds(timings.total_seconds)),
            ("all together", human(round(begun.elapsed()))),
        ] {
            text += &format!("  {what:<30} {took:>8}\n");
        }
        text += &format!("\n  accelerator: {accelerator}\n");
        if let Some(evidence) = &performance.evidence {
            let evidence = evidence.strip_prefix(&here).unwrap_or(evidence);
            text += &format!(
                "  evidence:    {0}\n               {0}/logs/serial.log is what the machine said, logs/diagnostics/ its screen, dmesg and journal\n",
                evidence.display()
            );
        }
        terminal::print(&text)?;
        Ok(verdict)
    }
}

fn round(duration: Duration) -> Duration {
    Duration::from_millis(duration.as_millis().try_into().unwrap_or(u64::MAX))
}
