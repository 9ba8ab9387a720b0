# Runs in the guest, in front of the login shell: takes requests from the terminal, line by line,
# and answers with frames that survive kernel messages. `shell.rs` types it without its comments.
# POSIX sh (dash, bash, busybox). Set by the one who starts it: sd_k the nonce, sd_t the terminal's
# settings before. All names begin with sd_, none is exported: commands see a clean environment.
# Starting a program is what costs time in an emulated guest, so builtins do what they can.
set -f
unset IFS
sd_id=0 sd_c= sd_need= sd_setsid=
# Memory before disk: what a command prints must not change the disks under test.
for sd_b in /run /dev/shm /tmp; do
  sd_d=$(mktemp -d "$sd_b/shakedown.XXXXXX") && break
done
trap 'trap "" HUP INT TERM; rm -rf "$sd_d"; stty "$sd_t"' EXIT
trap 'exit 129' HUP
trap 'exit 143' TERM
trap : INT
stty sane -echo -ixon
for sd_b in base64 cksum dd grep mktemp sed; do
  command -v "$sd_b" >/dev/null || sd_need="$sd_need $sd_b"
done
# In a session of its own a command can be killed whole, and cannot take our lines off the terminal.
command -v setsid >/dev/null && sd_setsid=setsid

sd_say() { printf '@%s:%s:%s.\n' "$sd_k" "$sd_id" "$1"; }
# Twice, so that one kernel message costs no time.
sd_tell() { sd_say "$sd_a:$1"; sd_say "$sd_a:$1"; }
# Lines of stream $1 (o, e) in the range $2, as sed writes it.
sd_lines() {
  base64 <"$sd_d/$1" | grep -n . | sed -n "$2{s/^/@$sd_k:$sd_id:$1/;s/\$/./;p;}"
}
# The same for few lines, with fewer programs.
sd_few() {
  [ -s "$sd_d/$1" ] || return
  sd_n=0
  for sd_l in $(base64 <"$sd_d/$1"); do
    sd_n=$((sd_n + 1))
    sd_say "$1$sd_n:$sd_l"
  done
}
sd_run() {
  case $sd_c in *\\*) sd_c=$(printf %b "$sd_c") ;; esac
  sd_f=/dev/null
  [ "$1" = i ] && sd_f=$sd_d/i
  : >"$sd_d/s"
  : >"$sd_d/o"
  : >"$sd_d/e"
  # The trap tells an exit status above 128 from a death by signal, which runs no trap (in bash it may
  # run, but then with another status).
  $sd_setsid sh -c "trap 'echo \$? >$sd_d/s' 0; echo \$\$ >$sd_d/p; $sd_c" \
    <"$sd_f" >>"$sd_d/o" 2>>"$sd_d/e" 4>&-
  sd_s=$?
  : >"$sd_d/p"
  sd_c= sd_w=exit
  if [ "$sd_s" -gt 128 ]; then
    read -r sd_w <"$sd_d/s"
    [ "$sd_w" = "$sd_s" ] && sd_w=exit || sd_w=signal
  fi
  set -- 4294967295 0 - 4294967295 0
  if [ -s "$sd_d/o" ] || [ -s "$sd_d/e" ]; then
    set -- $(cksum "$sd_d/o" "$sd_d/e")
  fi
  sd_a="end:$sd_s:$sd_w:$1:$2:$4:$5:$sd_s"
  if [ $(($2 + $5)) -lt 3000 ]; then
    sd_few o
    sd_few e
  else
    sd_lines o '1,$'
    sd_lines e '1,$'
  fi
  sd_tell 0
}
# Standard input from the base64 that came, if it has this checksum and size.
sd_load() {
  base64 -d <"$sd_d/b" >"$sd_d/i"
  : >"$sd_d/b"
  sd_a=load:bad
  [ "$(cksum <"$sd_d/i")" = "$*" ] && sd_a=load:ok
  sd_tell 0
}
sd_main() {
  trap 'sd_i=1' INT
  sd_a="ready:$(id -u):$sd_need"
  sd_tell 0
  while :; do
    sd_i=
    # Nonce, verb, request number, argument, the rest. Ctrl-C ends a read without a line.
    IFS=' ' read -r sd_m sd_v sd_n sd_x sd_r || {
      [ "$sd_i" ] && continue
      return
    }
    [ "$sd_m" = "$sd_k" ] || continue
    case $sd_v in
    add) sd_c=$sd_c$sd_r ;;
    run) sd_id=$sd_n sd_c=$sd_c$sd_r; sd_run "$sd_x" ;;
    # In canonical mode one read is one line: dd takes exactly its lines off the terminal.
    put) sd_id=$sd_n sd_a=put; dd bs=4096 count="$sd_x" >>"$sd_d/b"; sd_tell 0 ;;
    load) sd_id=$sd_n; sd_load "$sd_x" "$sd_r" ;;
    get) [ "$sd_n" = "$sd_id" ] && sd_lines "$sd_x" "$sd_r" ;;
    again) [ "$sd_n" = "$sd_id" ] && sd_tell "$sd_x" ;;
    sync) sd_id=$sd_n sd_c= sd_a=sync; : >"$sd_d/b"; sd_tell 0 ;;
    esac
  done
}
# A shell's trap waits for its foreground command, and a background command would ignore Ctrl-C. So
# another process waits for Ctrl-C, on a pipe that says nothing and ends with sd_main.
sd_kill() {
  read -r sd_p <"$sd_d/p" && { kill -s KILL -- "-$sd_p" || kill -s KILL "$sd_p"; }
}
sd_watch() {
  trap 'sd_i=1; sd_kill' INT
  trap 'sd_kill; exit' HUP TERM
  while :; do
    sd_i=
    read -r sd_l || [ "$sd_i" ] || return
  done
}
exec 3>&1
sd_main 4>&1 >&3 3>&- | sd_watch 3>&-
