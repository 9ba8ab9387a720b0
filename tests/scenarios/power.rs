//! The machine powers off cleanly, by the button and by itself.

use shakedown::prelude::*;

#[scenario(markers = [vm], boot = cold, timeout = "5m")]
fn the_power_button_powers_off_cleanly(vm: &mut Vm) -> Result<()> {
    vm.power_off()?;
    let console = vm.console_text();
    ensure!(vm.ended(), "QEMU still runs");
    ensure!(console.contains("reboot: Power down"), "the kernel did not get to power down:\n{console}");
    Ok(())
}

#[scenario(markers = [vm], timeout = "5m")]
fn a_screenshot_shows_the_screen(vm: &mut Vm) -> Result<()> {
    let file = vm.screenshot("screen")?;
    let png = std::fs::read(&file)?;
    ensure!(png.starts_with(b"\x89PNG\r\n\x1a\n"), "{} is no PNG", file.display());
    Ok(())
}
