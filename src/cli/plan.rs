//! `shakedown plan`: storage layouts, as plans to read and as runs to judge a cleaner by.

use super::Verdict;
use super::progress::Progress;
use super::project::Project;
use super::table::{Cell, Table};
use super::terminal::{self, Colour, Paint};
use super::value;
use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use shakedown::connection::ssh::Target;
use shakedown::connection::{Connection, KeyPair, Session, Ssh};
use shakedown::deadline::Deadline;
use shakedown::fault::Fault;
use shakedown::harness::Errand;
use shakedown::host;
use shakedown::record::Outcome;
use shakedown::record::event::Events;
use shakedown::storage::{self, Action, Cleaner, Evidence, LAYOUTS, Layout, Level, layout_named, matrix};
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

/// Show what makes, removes and checks a storage layout, or run it and judge the cleanup.
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true, arg_required_else_help = true, after_help = EXAMPLES)]
pub(super) struct Plan {
    #[command(subcommand)]
    command: Option<Command>,
    /// A layout of `shakedown plan list`
    #[arg(required = true)]
    layout: Option<String>,
    /// What the plan is for
    #[arg(required = true, value_enum)]
    phase: Option<Phase>,
    /// A POSIX script, or JSON
    #[arg(long, value_enum, default_value = "sh")]
    format: Format,
    /// The disks, in the layout's order [default: /dev/vdb and so on]
    #[arg(long, value_name = "DISK,...", value_delimiter = ',')]
    disks: Vec<String>,
    #[command(flatten)]
    action: ActionOption,
}

#[derive(clap::Subcommand)]
enum Command {
    /// List the layouts
    List {
        /// Print one JSON array
        #[arg(long)]
        json: bool,
    },
    Run(Run),
}

const EXAMPLES: &str = "\
Examples:
  shakedown plan list
  shakedown plan raid1-lvm teardown
  shakedown plan raid5-lvm seed --format json --disks /dev/sdb,/dev/sdc,/dev/sdd
  shakedown plan run raid1-lvm --on vm --cleaner /usr/local/sbin/storage-cleanup
  shakedown plan run swap --on ssh:root@lab-3 --disks /dev/sdb --confirm /dev/sdb";

#[derive(Clone, Copy, clap::ValueEnum)]
enum Phase {
    Seed,
    Teardown,
    Verify,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Format {
    Sh,
    Json,
}

#[derive(clap::Args)]
struct ActionOption {
    /// What becomes of the disks once nothing stands on them
    #[arg(long, value_enum, default_value = "wipe-signatures")]
    action: Choice,
}

#[derive(Clone, Copy, clap::ValueEnum)]
pub(super) enum Choice {
    WipeSignatures,
    Discard,
    Overwrite,
}

impl Choice {
    pub(super) fn action(self) -> Action {
        match self {
            Self::WipeSignatures => Action::WipeSignatures,
            Self::Discard => Action::Discard,
            Self::Overwrite => Action::Overwrite,
        }
    }
}

/// Make a layout, have it cleaned, and look whether it is gone, stays away, and is erased.
///
/// On a virtual machine, or by SSH as root on one of yours, with the key of `shakedown` in root's
/// `authorized_keys`. There it takes only disks that are named twice, and of which nothing is mounted,
/// swapped to, or shared with other disks; and disks are not searched raw, as the machine would have to be off.
#[derive(clap::Args)]
struct Run {
    /// A layout of `shakedown plan list`
    layout: String,
    /// `vm`, or `ssh:[USER@]HOST[:PORT]`
    #[arg(long, value_name = "WHERE", default_value = "vm")]
    on: String,
    /// The disks of that machine, in the layout's order: all that is on them is lost
    #[arg(long, value_name = "DISK,...", value_delimiter = ',')]
    disks: Vec<String>,
    /// The same disks again
    #[arg(long, value_name = "DISK,...", value_delimiter = ',')]
    confirm: Vec<String>,
    /// A command of that machine that cleans; it gets `--action ACTION DISK...` [default: our plan, step by step]
    #[arg(long, value_name = "COMMAND")]
    cleaner: Option<String>,
    #[command(flatten)]
    action: ActionOption,
    /// How long all of it may take
    #[arg(long, value_name = "TIME", value_parser = value::limit, default_value = "15m")]
    timeout: Duration,
    /// Print one JSON object, with the evidence of every step
    #[arg(long)]
    json: bool,
}

impl Plan {
    pub(super) fn run(self) -> Result<Verdict> {
        match self.command {
            Some(Command::List { json }) => list(json).map(|()| Verdict::Fine),
            Some(Command::Run(run)) => run.run(),
            None => self.show().map(|()| Verdict::Fine),
        }
    }

    fn show(&self) -> Result<()> {
        let layout = layout_named(self.layout.as_deref().unwrap_or_default())?;
        let disks = match &self.disks[..] {
            [] => (0..layout.disks())
                .map(|number| format!("/dev/vd{}", char::from(b'b' + number as u8)))
                .collect(),
            disks => disks.to_vec(),
        };
        check_disks(layout, &disks)?;
        let plan = match self.phase.context("no phase is given")? {
            Phase::Seed => layout.seed(&disks),
            Phase::Teardown => layout.teardown(&disks, self.action.action.action()),
            Phase::Verify => layout.verify(&disks),
        };
        match self.format {
            Format::Sh => terminal::print(&plan.script()),
            Format::Json => terminal::print_json(&plan),
        }
    }
}

fn check_disks(layout: &Layout, disks: &[String]) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._:+-".contains(c);
    let odd = disks.iter().find(|disk| !disk.starts_with("/dev/") || !disk.chars().all(plain));
    ensure!(odd.is_none(), "{:?} is not the path of a disk below /dev", odd.map_or("", |disk| disk));
    let (needs, given) = (layout.disks(), disks.len());
    ensure!(needs == given, "{} needs {needs} disks, and {given} are given", layout.name);
    Ok(())
}

fn list(as_json: bool) -> Result<()> {
    if as_json {
        let layouts = LAYOUTS.iter().map(|layout| {
            json!({
                "name": layout.name,
                "about": layout.about,
                "disks": layout.disks(),
                "disk_bytes": storage::DISK_BYTES,
                "programs": layout.programs(),
            })
        });
        return terminal::print_json(&layouts.collect::<Vec<_>>());
    }
    let mut table = Table::new(["LAYOUT", "DISKS", "NEEDS", "WHAT IT IS"]);
    for layout in LAYOUTS {
        let programs: Vec<_> = layout.programs().into_iter().collect();
        table.row([
            layout.name.into(),
            format!("{} x {}M", layout.disks(), storage::DISK_BYTES >> 20).into(),
            programs.join(" ").into(),
            layout.about.into(),
        ]);
    }
    terminal::print(&table.render(Paint::of(&io::stdout())))
}

/// All that a run gives.
struct Told {
    verdicts: Vec<storage::Verdict>,
    /// By phase.
    evidence: Vec<(&'static str, Evidence)>,
}

impl Run {
    fn run(self) -> Result<Verdict> {
        let layout = layout_named(&self.layout)?;
        let told = match self.on.split_once(':') {
            None if self.on == "vm" => self.on_vm(layout)?,
            Some(("ssh", host)) => self.on_host(layout, host)?,
            _ => bail!("--on is `vm` or `ssh:[USER@]HOST[:PORT]`, not `{}`", self.on),
        };
        let passed =
            told.verdicts.iter().all(|verdict| matches!(verdict.outcome, Outcome::Passed | Outcome::Ignored));
        if self.json {
            let evidence: serde_json::Map<_, _> = told
                .evidence
                .iter()
                .map(|(phase, evidence)| ((*phase).to_owned(), json!(evidence)))
                .collect();
            terminal::print_json(&json!({
                "layout": layout.name,
                "action": self.action.action.action(),
                "on": self.on,
                "levels": told.verdicts,
                "evidence": evidence,
            }))?;
        } else {
            terminal::print(&told.text())?;
        }
        Ok(if passed { Verdict::Fine } else { Verdict::NotFine })
    }

    fn cleaner(&self) -> Cleaner {
        self.cleaner.clone().map_or(Cleaner::Plan, Cleaner::Command)
    }

    /// All but the last level.
    fn conduct(&self, session: &mut Session<'_>, layout: &Layout, disks: &[String]) -> Result<Told> {
        let seeded = storage::seed(session, layout, disks)?;
        let cleaned = storage::clean(session, disks, self.action.action.action(), &self.cleaner())?;
        let (verdicts, looked) = storage::verify(session, layout, disks, &cleaned)?;
        Ok(Told { verdicts, evidence: vec![("seed", seeded), ("teardown", cleaned), ("verify", looked)] })
    }

    fn on_vm(&self, layout: &'static Layout) -> Result<Told> {
        ensure!(
            self.disks.is_empty(),
            "--disks is for machines of yours; ours has a disk for each of the layout's"
        );
        let Project { environment, settings } = Project::here()?;
        let progress = Progress::brief();
        let errand = Errand { name: "plan-run", needs: matrix::MACHINE, timeout: self.timeout };
        let result = errand.run(environment, settings, Events::to(progress.clone()), |vm| {
            let placed = matrix::Placed::alone(layout);
            matrix::mark_bystander(vm)?;
            let mut told = self.conduct(&mut vm.shell()?, layout, &placed.disks())?;
            told.verdicts.push(matrix::search_raw(vm, &[placed], self.action.action.action())?.remove(0));
            Ok(told)
        });
        progress.finish();
        result
    }

    fn on_host(&self, layout: &'static Layout, host: &str) -> Result<Told> {
        check_disks(layout, &self.disks)?;
        let deadline = Deadline::after(self.timeout, "--timeout");
        let key = KeyPair::load_or_create(&host::cache_dir()?.join("keys"))?;
        let (user, place) = host.rsplit_once('@').unwrap_or(("root", host));
        let patience = deadline.within(Duration::from_secs(30), "the connection to the host");
        let file =
            key.file().map(|file| file.with_extension("pub").display().to_string()).unwrap_or_default();
        let mut ssh = Ssh::open(Target::new(address(place)?, user, key), &patience).with_context(|| {
            Fault::host(format!("no SSH to {host}")).fix(format!("put {file} into its authorized_keys"))
        })?;
        terminal::say(&format!("on {}", ssh.peer()));
        let mut session = Session::new(&mut ssh, deadline, Events::silent());
        let disks = storage::admit(&mut session, &self.disks, &self.confirm)?;
        let mut told = self.conduct(&mut session, layout, &disks)?;
        told.verdicts.push(storage::Verdict {
            level: Level::Erased,
            outcome: Outcome::Ignored,
            reason: Some("the machine would have to be off".into()),
        });
        Ok(told)
    }
}

fn address(place: &str) -> Result<SocketAddr> {
    let with_port = if place.parse::<SocketAddr>().is_ok() || place.contains(':') {
        place.to_owned()
    } else {
        format!("{place}:22")
    };
    let mut found = with_port.to_socket_addrs().with_context(|| format!("cannot find the host {place}"))?;
    found.next().with_context(|| format!("the host {place} has no address"))
}

impl Told {
    fn text(&self) -> String {
        let mut table = Table::new(["LEVEL", "OUTCOME"]);
        let mut reasons = String::new();
        for verdict in &self.verdicts {
            let colour = match verdict.outcome {
                Outcome::Passed => Colour::Green,
                Outcome::Ignored => Colour::Dim,
                _ => Colour::Red,
            };
            table
                .row([verdict.level.to_string().into(), Cell::coloured(verdict.outcome.to_string(), colour)]);
            if let Some(reason) = &verdict.reason {
                reasons += &format!("\n{}, {}:\n{reason}\n", verdict.level, verdict.outcome);
            }
        }
        table.render(Paint::of(&io::stdout())) + &reasons
    }
}
