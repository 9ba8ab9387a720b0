//! An image that this project did not build: Debian's own GRUB rescue CD, of `grub-rescue-pc`.

use shakedown::prelude::*;
use std::time::Duration;

#[scenario(markers = [vm], image = "grub-rescue", boot = cold, medium = cdrom, timeout = "2m")]
fn a_foreign_iso_reaches_its_first_screen(vm: &mut Vm) -> Result<()> {
    // It says nothing on the serial console; its menu is on the screen.
    let screen = vm.wait_for_screen("(?s)GNU GRUB +version.*Memtest86", Duration::from_secs(60))?;
    let shot = vm.screenshot("first-screen")?;
    ensure!(screen.contains("GNU/Linux"), "the menu lacks its entries:\n{screen}");
    ensure!(shot.is_file(), "no screenshot at {}", shot.display());
    Ok(())
}
