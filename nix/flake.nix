# A NixOS that boots from CD-ROM, USB stick or disk, and lets Shakedown in.
#
#   nix build ./nix#bootImage        what the `nix` recipe runs
#   nix develop ./nix                a shell to build and test Shakedown in
{
  description = "The boot image of the `nix` recipe";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";

  outputs =
    { self, nixpkgs }:
    let
      system = "x86_64-linux";
      pkgs = nixpkgs.legacyPackages.${system};
      machine = nixpkgs.lib.nixosSystem {
        inherit system;
        modules = [
          "${nixpkgs}/nixos/modules/installer/cd-dvd/iso-image.nix"
          "${nixpkgs}/nixos/modules/profiles/minimal.nix"
          "${nixpkgs}/nixos/modules/profiles/qemu-guest.nix"
          self.nixosModules.default
        ];
      };
    in
    {
      # For images of one's own: all that Shakedown needs of a machine.
      nixosModules.default = import ./machine.nix;

      packages.${system} = {
        bootImage = machine.config.system.build.isoImage;
        default = self.packages.${system}.bootImage;
      };

      devShells.${system}.default = pkgs.mkShell {
        packages = [
          pkgs.cargo
          pkgs.clippy
          pkgs.rustc
          pkgs.rustfmt
          # OpenSSL is built in.
          pkgs.perl
          pkgs.pkg-config
          # What `shakedown doctor` looks for, but for mmdebstrap and GRUB: those serve Debian's image.
          pkgs.mtools
          pkgs.qemu
          pkgs.squashfsTools
          pkgs.xorriso
        ];
      };
    };
}
