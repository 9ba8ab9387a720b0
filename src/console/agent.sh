# Runs in the guest, in front of the login shell: takes requests from the terminal, line by line,
# and answers with frames that survive kernel messages. `shell.rs` types it without its comments.
# POSIX sh (dash, bash, busybox). Set by the one who starts it: sd_k the nonce, sd_t the terminal's
# settings before. All names begin with sd_, none is exported: commands see a clean environment.
set -f
unset IFS
sd_id=0 sd_p= sd_c= sd_run= sd_need=
# Memory before disk: what a command prints must not change the disks under test.
for sd_b in /run /dev/shm /tmp; do
  sd_d=$(mktemp -d "$sd_b/shakedown.XXXXXX") && break
done
trap 'rm -rf "$sd_d"; stty "$sd_t"' EXIT
trap 'exit 129' HUP
trap 'exit 143' TERM
trap 'sd_i=1; [ -z "$sd_p" ] || kill -s KILL -- "-$sd_p" || kill -s KILL "$sd_p"' INT
stty sane -echo -ixon
# A session of its own lets all of a command be killed; without -echo above it could read our lines.
command -v setsid >/dev/null && sd_run=setsid
# A shell starts `&` commands with these two ignored.
env --default-signal=INT,QUIT true && sd_run="env --default-signal=INT,QUIT $sd_run"
for sd_b in base64 cksum dd grep mktemp sed; do
  command -v "$sd_b" >/dev/null || sd_need="$sd_need $sd_b"
done

sd_say() { printf '@%s:%s:%s.\n' "$sd_k" "$sd_id" "$1"; }
# Twice, so that one kernel message costs no time.
sd_tell() { sd_say "$sd_a:$1"; sd_say "$sd_a:$1"; }
# Lines of stream $1 (o, e) in the range $2, as sed writes it.
sd_lines() {
  base64 <"$sd_d/$1" | grep -n . | sed -n "$2{s/^/@$sd_k:$sd_id:$1/;s/\$/./;p;}"
}
# The same for few lines, with fewer processes.
sd_few() {
  [ -s "$sd_d/$1" ] || return
  sd_n=0
  for sd_l in $(base64 <"$sd_d/$1"); do
    sd_n=$((sd_n + 1))
    sd_say "$1$sd_n:$sd_l"
  done
}
sd_go() {
  sd_f=/dev/null
  [ "$sd_x" = i ] && sd_f=$sd_d/i
  : >"$sd_d/s"
  # The trap tells an exit status above 128 from a death by signal, which runs no trap (in bash it may
  # run, but then with another status).
  $sd_run sh -c "trap 'echo \$? >$sd_d/s' 0; $sd_c" <"$sd_f" >"$sd_d/o" 2>"$sd_d/e" &
  sd_p=$!
  while :; do
    sd_i=
    wait "$sd_p"
    sd_s=$?
    [ "$sd_i" ] || break
  done
  sd_p= sd_c= sd_w=exit
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
sd_put() {
  # In canonical mode one read is one line: dd takes exactly its lines off the terminal.
  dd bs=4096 count="$sd_x" | base64 -d >"$sd_d/c"
  set -- $(cksum <"$sd_d/c")
  sd_a=put:ok
  case $sd_r in
  "$1 $2 new") mv "$sd_d/c" "$sd_d/i" ;;
  "$1 $2 add") cat "$sd_d/c" >>"$sd_d/i" ;;
  *) sd_a=put:bad ;;
  esac
  sd_tell 0
}

sd_a="ready:$(id -u):$sd_need"
sd_tell 0
while :; do
  sd_i=
  # Nonce, verb, request number, argument, the rest.
  IFS=' ' read -r sd_m sd_v sd_n sd_x sd_r || {
    [ "$sd_i" ] && continue
    exit
  }
  [ "$sd_m" = "$sd_k" ] || continue
  case $sd_v in
  add) sd_c=$sd_c$sd_r ;;
  run) sd_id=$sd_n sd_c=$(printf %b "$sd_c$sd_r"); sd_go ;;
  put) sd_id=$sd_n; sd_put ;;
  get) [ "$sd_n" = "$sd_id" ] && sd_lines "$sd_x" "$sd_r" ;;
  again) [ "$sd_n" = "$sd_id" ] && sd_tell "$sd_x" ;;
  sync) sd_id=$sd_n sd_c= sd_a=sync; sd_tell 0 ;;
  esac
done
