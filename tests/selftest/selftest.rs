//! Scenarios that end in every way there is. `tests/harness/` runs this binary and checks what it
//! says; it is an example, not a test, because half of it fails on purpose.

use shakedown::fault::Fault;
use shakedown::prelude::*;
use std::path::Path;

mod group {
    use shakedown::prelude::*;

    #[scenario(markers = [slow])]
    fn passes_slowly() -> Result<()> {
        Ok(())
    }
}

#[scenario]
fn passes() {}

#[scenario(markers = [broken])]
fn fails() -> Result<()> {
    ensure!(1 + 1 == 3, "3 disks expected, 2 found");
    Ok(())
}

#[scenario(markers = [broken])]
fn panics() {
    assert_eq!(1 + 1, 3, "sums are off");
}

#[scenario(markers = [broken])]
fn host_breaks() -> Result<()> {
    let error = std::fs::File::open("/no/such/tool").map(drop);
    error.context(Fault::host("the tool is missing").fix("apt-get install tool"))
}

#[scenario(markers = [broken], timeout = "200ms")]
fn hangs() {
    wait_for_ever();
}

#[scenario(ignore = "the lab is closed")]
fn ignored_by_itself() {}

#[scenario(markers = [nightly])]
fn ignored_by_marker() {}

/// Says that it has begun, for the test that interrupts it.
#[scenario(ignore = "waits for Ctrl-C")]
fn interrupted_a() {
    if let Some(flag) = std::env::var_os("SELFTEST_FLAG") {
        std::fs::write(Path::new(&flag), "begun").expect("writable");
    }
    wait_for_ever();
}

#[scenario(ignore = "waits for Ctrl-C")]
fn interrupted_b() {}

fn wait_for_ever() {
    loop {
        std::thread::park();
    }
}

shakedown::main!();
