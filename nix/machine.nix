# What Shakedown needs of a machine: the serial console, SSH by a key that enters at boot, the guest
# agent, and the tools for RAID and LVM.
{ lib, pkgs, ... }:
{
  # The last console is /dev/console; systemd starts a getty on each.
  boot.kernelParams = [
    "console=tty0"
    "console=ttyS0,115200"
    "panic=-1"
    # An emulator translates a program anew for each address that it is loaded to.
    "norandmaps"
  ];
  services.getty.autologinUser = "root";
  users.users.root.initialHashedPassword = "";

  # No key is in the image: it comes as the credential `ssh.authorized_keys.root`, by SMBIOS. The rule is
  # that of systemd's own provision.conf, which NixOS leaves out.
  boot.initrd.kernelModules = [ "dmi_sysfs" ];
  systemd.tmpfiles.settings."50-shakedown" = {
    "/root/.ssh".d = {
      mode = "0700";
      user = "root";
      group = "root";
    };
    "/root/.ssh/authorized_keys"."f^" = {
      mode = "0600";
      user = "root";
      group = "root";
      argument = "ssh.authorized_keys.root";
    };
    # Where Shakedown looks for its cleaner in any image.
    "/usr/local/sbin/storage-cleanup"."L+".argument = "/run/current-system/sw/bin/storage-cleanup";
  };
  services.openssh = {
    enable = true;
    # RSA takes an emulated CPU eight seconds.
    hostKeys = [
      {
        type = "ed25519";
        path = "/etc/ssh/ssh_host_ed25519_key";
      }
    ];
    settings = {
      PermitRootLogin = "prohibit-password";
      PasswordAuthentication = false;
      KbdInteractiveAuthentication = false;
      UseDns = false;
    };
  };

  services.qemuGuest.enable = true;

  networking = {
    hostName = "shakedown";
    useNetworkd = true;
    useDHCP = true;
    firewall.enable = false;
  };
  systemd.network.wait-online.enable = false;

  boot.swraid = {
    enable = true;
    # Its monitor does not start without.
    mdadmConf = "MAILADDR root";
  };
  services.lvm.enable = true;
  environment.systemPackages = [
    pkgs.gptfdisk
    pkgs.lvm2
    pkgs.util-linux
    (pkgs.writeShellScriptBin "storage-cleanup" ''
      PATH=${
        lib.makeBinPath [
          pkgs.cryptsetup
          pkgs.lvm2
          pkgs.mdadm
          pkgs.util-linux
        ]
      }:$PATH
      ${builtins.readFile ./storage-cleanup}
    '')
  ];

  isoImage = {
    makeEfiBootable = true;
    makeUsbBootable = true;
    # Half the size costs minutes of every build; the image lives for a day.
    squashfsCompression = "zstd -Xcompression-level 3";
  };
  # Nobody is there to choose. Zero would be for ever in ISOLINUX.
  boot.loader.timeout = lib.mkForce 1;

  documentation.enable = false;
  system.stateVersion = lib.trivial.release;
}
