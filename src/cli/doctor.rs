//! `shakedown doctor`: what this host has, what it lacks, and installing that.

use super::Verdict;
use super::project::Project;
use super::table::{Cell, Table};
use super::terminal::{self, Colour, Paint};
use anyhow::{Context, Result};
use serde::Serialize;
use shakedown::deadline::{Deadline, Stop};
use shakedown::fault::Fault;
use shakedown::host::apt::Plan;
use shakedown::host::setting::Invalid;
use shakedown::host::tools::{Part, install_fix};
use shakedown::host::{self, Report, State};
use shakedown::process;
use shakedown::vm::accel::{self, Accel, Kind};
use std::io::{self, IsTerminal};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Check this host: tools, firmware, packages, memory, disk and the accelerator.
///
/// In a project also what its Cargo.toml asks for. Exits with 0 only when an image can be built,
/// booted and tested here.
#[derive(clap::Args)]
pub(super) struct Doctor {
    /// Install what is missing (Debian and Ubuntu; by sudo when not root)
    #[arg(long)]
    install: bool,
    /// Install without asking
    #[arg(long, short, requires = "install")]
    yes: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// All that doctor knows; `--json` prints it as it is.
#[derive(Serialize)]
pub(super) struct Diagnosis {
    schema_version: u32,
    version: &'static str,
    pub(super) ok: bool,
    #[serde(flatten)]
    report: Report,
    /// `null` when there is no usable QEMU to ask.
    pub(super) accelerator: Option<Accel>,
    /// What the project adds, to look again after an installation.
    #[serde(skip)]
    project: Project,
}

impl Doctor {
    pub(super) fn run(self) -> Result<Verdict> {
        let mut diagnosis = Diagnosis::make(Project::here()?)?;
        if self.install {
            diagnosis = diagnosis.treat(self.yes)?;
        }
        if self.json {
            terminal::print_json(&diagnosis)?;
        } else {
            terminal::print(&diagnosis.text(Paint::of(&io::stdout())))?;
        }
        Ok(if diagnosis.ok { Verdict::Fine } else { Verdict::NotFine })
    }
}

impl Diagnosis {
    pub(super) fn make(project: Project) -> Result<Self> {
        let Project { environment, settings } = &project;
        // A prebuilt image needs no tools to build one.
        let prebuilt = environment.overrides.contains_key("SHAKEDOWN_IMAGE");
        let mut parts = if prebuilt { vec![Part::Machines] } else { vec![Part::Machines, Part::Image] };
        if settings.has_recipe("nix") {
            parts.push(Part::Nix);
        }
        let report = Report::collect(&parts, &settings.tools, &host::cache_dir()?, &environment.log_root);
        let deadline = Deadline::after(Duration::from_secs(60), "doctor");
        let accelerator = match accel::detect_afresh(&deadline) {
            Ok(accelerator) => Some(accelerator),
            Err(error) if error.is::<Invalid>() => return Err(error),
            // Without QEMU there is no answer, and the table says why.
            Err(_) if report.problems().any(|check| check.name == "qemu-system-x86_64") => None,
            Err(error) => return Err(error),
        };
        if process::interrupted() {
            return Err(Stop::Interrupted.into());
        }
        Ok(Self {
            schema_version: 1,
            version: env!("CARGO_PKG_VERSION"),
            ok: report.ok(),
            report,
            accelerator,
            project,
        })
    }

    /// Installs what is missing, with the user's consent, and looks again.
    ///
    /// An installation may remove what does not go along with it, such as tools of a newer QEMU from
    /// elsewhere; what goes along with it is then installed in their place.
    pub(super) fn treat(mut self, yes: bool) -> Result<Self> {
        let mut tried = Vec::new();
        while let Some(plan) = Plan::new(self.report.missing_packages())? {
            // The same once more would end the same way.
            if tried.contains(&plan) || !self.install(&plan, yes)? {
                break;
            }
            tried.push(plan);
            self = Self::make(self.project)?;
        }
        Ok(self)
    }

    /// Whether it was consented to.
    fn install(&self, plan: &Plan, yes: bool) -> Result<bool> {
        for check in self.report.problems() {
            terminal::say(&format!("{}: {} ({})", check.name, check.found, check.why));
        }
        let line = plan.line(host::is_root());
        terminal::say(&format!("This will be run:\n  {line}"));
        if !yes && terminal::interactive() && !terminal::ask("Go on?")? {
            return Ok(false);
        }
        if !host::is_root() {
            prepare_sudo(plan)?;
        }
        let log = host::cache_dir()?.join("install.log");
        let deadline = Deadline::after(Duration::from_secs(3600), "installation of packages");
        plan.run(&log, &deadline, terminal::say)?;
        terminal::say(&format!("All output: {}", log.display()));
        Ok(true)
    }

    pub(super) fn text(&self, paint: Paint) -> String {
        let mut table = Table::new(["", "NEEDED", "FOUND", "WHAT FOR", "PACKAGE"]);
        for check in &self.report.checks {
            let state = match check.state {
                State::Ok => Cell::coloured("ok", Colour::Green),
                State::Missing => Cell::coloured("missing", Colour::Red),
                State::Old => Cell::coloured("old", Colour::Red),
                State::Unfit => Cell::coloured("unfit", Colour::Red),
            };
            let package = Cell::coloured(check.packages.join(" "), Colour::Dim);
            table.row([
                state,
                check.name.as_str().into(),
                clip(&check.found).into(),
                check.why.into(),
                package,
            ]);
        }
        let mut text = format!("{}, Linux {}\n\n", self.report.os, self.report.kernel);
        text += &table.render(paint);
        text += "\nAccelerator: ";
        text += &match &self.accelerator {
            Some(Accel { kind, reason, fix }) => {
                let note = if *kind == Kind::Tcg { "; machines run several times slower" } else { "" };
                let fix = fix.as_ref().map(|fix| format!("\n  {fix}")).unwrap_or_default();
                format!("{kind} ({reason}{note}){fix}\n")
            }
            None => "unknown without QEMU\n".into(),
        };
        text += &match self.report.problems().count() {
            0 => paint.paint(Colour::Green, "\nReady: images can be built, booted and tested here.\n"),
            count => paint.paint(Colour::Red, &format!("\nNot ready, {count} to fix:\n")),
        };
        let (missing, other): (Vec<_>, Vec<_>) = self
            .report
            .problems()
            .partition(|check| check.state == State::Missing && !check.packages.is_empty());
        if !missing.is_empty() {
            let names: Vec<_> = missing.iter().map(|check| check.name.as_str()).collect();
            let packages = host::check::packages(missing.iter().copied()).join(" ");
            text += &format!("  {}: {}\n", names.join(", "), install_fix(&packages));
        }
        for check in other {
            text += &format!("  {}: {}\n", check.name, check.found);
            text += &check.fix.as_ref().map(|fix| format!("    {fix}\n")).unwrap_or_default();
        }
        text
    }
}

/// Keeps the table narrow; what is cut off here is said in full below it.
fn clip(found: &str) -> String {
    const WIDTH: usize = 40;
    if found.chars().count() <= WIDTH {
        return found.into();
    }
    found.chars().take(WIDTH - 1).chain(['…']).collect()
}

/// Makes sure that sudo will not ask while apt runs, by letting it ask now where someone can answer.
fn prepare_sudo(plan: &Plan) -> Result<()> {
    let silent = |command: &mut Command| {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()
    };
    let cannot = |why: &str| {
        let fix = format!("As root, run this: {}", plan.line(true));
        Fault::host(format!("cannot install as this user: {why}")).fix(fix)
    };
    match silent(Command::new("sudo").args(["-n", "true"])) {
        Ok(status) if status.success() => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(cannot("there is no sudo").into());
        }
        Err(error) => return Err(error).context("cannot start sudo"),
        Ok(_) => {}
    }
    if !io::stdin().is_terminal() {
        return Err(cannot("sudo wants a password and there is no terminal to ask on").into());
    }
    // Not by `process::spawn`: only the foreground process group may read the terminal.
    let status = Command::new("sudo").arg("-v").status().context("cannot start sudo")?;
    if status.success() { Ok(()) } else { Err(cannot("sudo refused").into()) }
}
