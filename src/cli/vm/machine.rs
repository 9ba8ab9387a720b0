//! The options that describe a machine, and getting that machine.

use crate::cli::progress::Progress;
use crate::cli::project::Project;
use crate::cli::value;
use anyhow::{Context, Result, ensure};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use shakedown::harness::Errand;
use shakedown::image::{BUILT_IN, IMAGE_VARIABLE};
use shakedown::record::event::Events;
use shakedown::vm::needs::is_hostname;
use shakedown::vm::{Boot, Bus, DiskNeed, Firmware, Needs, Vm};
use std::path::Path;
use std::time::Duration;

#[derive(clap::Args)]
#[command(next_help_heading = "Machine")]
pub(super) struct Machine {
    /// An image of this project, or a file: ISO, raw, qcow2 [default: the project's default image]
    #[arg(long, value_name = "NAME|FILE")]
    image: Option<String>,
    /// A blank disk of this size, such as `1500M`; can be given several times
    #[arg(long = "disk", value_name = "SIZE", value_parser = value::disk)]
    disks: Vec<u64>,
    /// Its memory
    #[arg(long, value_name = "SIZE", value_parser = value::memory, default_value = "1G")]
    memory: u32,
    /// Its CPUs; 255 is the limit of QEMU's q35
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=255), default_value_t = 2)]
    cpus: u32,
    /// What starts it
    #[arg(long, value_parser = firmware(), default_value = "bios")]
    firmware: Firmware,
    /// Boot it, rather than forking one that has booted
    #[arg(long)]
    cold: bool,
    /// Its name, instead of its image's
    #[arg(long, value_name = "NAME", value_parser = hostname)]
    hostname: Option<String>,
    /// A machine id of its own, instead of its image's or its template's
    #[arg(long)]
    fresh_machine_id: bool,
}

fn firmware() -> impl TypedValueParser<Value = Firmware> {
    PossibleValuesParser::new(["bios", "uefi"])
        .map(|word| if word == "uefi" { Firmware::Uefi } else { Firmware::Bios })
}

fn hostname(name: &str) -> Result<String> {
    ensure!(is_hostname(name), "write up to 63 letters, digits and inner hyphens");
    Ok(name.to_owned())
}

impl Machine {
    /// Gets the machine for `work`, which must end within `timeout`. Afterwards it is gone.
    pub(super) fn with<T>(
        self,
        name: &'static str,
        timeout: Duration,
        work: impl FnOnce(&mut Vm) -> Result<T>,
    ) -> Result<T> {
        let Project { mut environment, settings } = Project::here()?;
        let mut needs = self.needs();
        if let Some(image) = self.image {
            let known = BUILT_IN.contains(&&*image) || settings.images.contains_key(&image);
            if !known && (image.contains('/') || Path::new(&image).is_file()) {
                let file = std::path::absolute(&image).context("cannot tell the current directory")?;
                environment.overrides.insert(IMAGE_VARIABLE.into(), file.to_string_lossy().into_owned());
            } else {
                needs.image = Some(image.leak());
            }
        }
        let progress = Progress::brief();
        let errand = Errand { name, needs, timeout };
        let result = errand.run(environment, settings, Events::to(progress.clone()), |vm| {
            progress.finish();
            work(vm)
        });
        progress.finish();
        result
    }

    fn needs(&self) -> Needs {
        let disk = |&bytes: &u64| DiskNeed { bytes, bus: Bus::Virtio };
        Needs {
            boot: if self.cold { Boot::Cold } else { Boot::Fork },
            firmware: self.firmware,
            // Needs are made for statics; these live as long as the process, too.
            disks: self.disks.iter().map(disk).collect::<Vec<_>>().leak(),
            memory_mib: self.memory,
            cpus: self.cpus,
            hostname: self.hostname.clone().map(|name| &*name.leak()),
            fresh_machine_id: self.fresh_machine_id,
            ..Needs::DEFAULT
        }
    }
}
