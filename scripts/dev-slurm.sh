#!/usr/bin/env bash
# A Slurm cluster for development: real daemons with accounting, and several virtual nodes with fake GPUs, all on this
# machine. See docs/development-cluster.md.
#
#   eval "$(scripts/dev-slurm.sh up)"   start or repair it, and point sbatch, squeue, ... of this shell at it
#   scripts/dev-slurm.sh status         show what runs; exit code 0 only if jobs can be submitted
#   scripts/dev-slurm.sh down           end its jobs and daemons, and delete all of its files
#   scripts/dev-slurm.sh down --keep    end them, but keep its queue and accounting for the next `up`
#
# Needs root on Debian or Ubuntu (a container is enough); missing packages are installed. Exit code 2: it cannot run
# here, or an option is wrong; the message says why.
#
# Options are environment variables. Every state directory is a separate cluster; clusters that run at the same time
# also need different base ports. An existing cluster keeps the values that it was created with.
#
#   DEV_SLURM_STATE   its directory               [${TMPDIR:-/tmp}/dev-slurm-UID]
#   DEV_SLURM_NODES   nodes, node1 and so on      [4]
#   DEV_SLURM_GPUS    fake GPUs per node          [8]
#   DEV_SLURM_CPUS    CPUs per node, which may be more than the machine has  [8]
#   DEV_SLURM_PORT    base port; this port, the next one, and base + 11, ... for the nodes are used   [16800]
#
# Partitions: gpu, the default; and low, whose jobs are requeued when a job of gpu needs their resources (they get
# their --signal and 5 seconds).
set -euo pipefail

defaults=(NODES=4 GPUS=8 CPUS=8 PORT=16800)
packages=(slurmctld slurmd slurm-client slurmdbd munge mariadb-server-core mariadb-client-core)
programs=(slurmctld slurmd slurmdbd sbatch scontrol sacct sacctmgr munged munge mariadbd mariadb-install-db
  my_print_defaults)
state=${DEV_SLURM_STATE:-${TMPDIR:-/tmp}/dev-slurm-$UID}
# Every process of the cluster has this variable; `down` ends the processes that have it.
mark=DEV_SLURM_CLUSTER=$state

say() { echo "dev-slurm: $*" >&2; }

refuse() { # refuse MESSAGE: exit with code 2
  echo "error: $*" >&2
  exit 2
}

fail() { # fail NAME MESSAGE: exit with code 1, after the end of the daemon's log
  local log
  echo "error: $2" >&2
  for log in "$state/log/$1".{out,log}; do
    if [ -s "$log" ]; then
      echo "The end of $log:" >&2
      tail -n 10 "$log" >&2
    fi
  done
  exit 1
}

usage() { sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "$0"; }

listens() { (exec 3<> "/dev/tcp/127.0.0.1/$1") 2> /dev/null; }

# -- settings and requirements

check_state_directory() {
  # Slurm's files have no quoting, and a socket's path has at most 107 characters.
  [[ $state =~ ^/[A-Za-z0-9._/+-]{1,70}$ && $state != *//* && $state != */ ]] \
    || refuse "DEV_SLURM_STATE=$state is not a plain absolute path of at most 70 characters."
  if [ -e "$state" ] && ! [ -O "$state" ]; then
    refuse "$state belongs to another user: choose another DEV_SLURM_STATE."
  fi
  if [ ! -f "$state/settings" ] && [ -n "$(ls -A "$state" 2> /dev/null)" ]; then
    refuse "$state holds something else than a development cluster: choose another DEV_SLURM_STATE."
  fi
}

read_settings() { # sets NODES, GPUS, CPUS, PORT: those of the existing cluster, otherwise the requested ones
  local default name asked kept
  for default in "${defaults[@]}"; do
    name=${default%=*}
    asked=DEV_SLURM_$name
    asked=${!asked:-}
    [[ $asked =~ ^[1-9][0-9]{0,4}$|^$ ]] || refuse "DEV_SLURM_$name=$asked is not a number from 1 on."
    kept=$(sed -n "s/^$name=//p" "$state/settings" 2> /dev/null || true)
    if [ -n "$kept" ] && [ -n "$asked" ] && [ "$asked" != "$kept" ]; then
      refuse "the cluster in $state was made with DEV_SLURM_$name=$kept, not $asked: end it first ($0 down)," \
        "or choose another DEV_SLURM_STATE and DEV_SLURM_PORT."
    fi
    declare -g "$name=${asked:-${kept:-${default#*=}}}"
  done
  [ $((PORT + 10 + NODES)) -le 65535 ] || refuse "DEV_SLURM_PORT=$PORT leaves no ports for $NODES nodes."
}

missing_programs() { # prints the missing programs in one line
  local program missing=()
  for program in "${programs[@]}"; do
    type -P "$program" > /dev/null || missing+=("$program")
  done
  echo "${missing[*]}"
}

install_packages() {
  local missing remedy log
  missing=$(missing_programs)
  remedy="Install ${packages[*]}; as root on Debian or Ubuntu, with a package index, dev-slurm.sh does it itself."
  [ "$UID" = 0 ] || refuse "a development cluster needs root${missing:+, and there is no $missing. $remedy}"
  [ -n "$missing" ] || return 0
  type -P apt-get > /dev/null || refuse "there is no $missing, and no apt-get. $remedy"
  say "installing ${packages[*]}"
  log=$(mktemp)
  if ! install_with_apt > "$log" 2>&1; then
    tail -n 5 "$log" >&2
    rm "$log"
    refuse "there is no $missing, and apt-get could not install it. $remedy"
  fi
  rm "$log"
  missing=$(missing_programs)
  [ -z "$missing" ] || refuse "there is no $missing, although ${packages[*]} are installed."
}

install_with_apt() {
  local wanted=("${packages[@]}")
  exec 9< "$(type -P apt-get)"
  flock 9 # another `up` may be installing the same packages
  apt-get update || return 1
  # Older releases have the database's programs only in the package that also starts the service.
  apt-cache show mariadb-server-core > /dev/null || wanted=("${packages[@]/%mariadb-*-core/mariadb-server}")
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${wanted[@]}"
}

lock_state() { # one command at a time; the directory itself is the lock, so no lock file is left behind
  mkdir -p "$state"
  exec 9< "$state"
  flock -w 120 9 || fail lock "another dev-slurm.sh works on $state"
  # The previous holder of the lock may have deleted the directory.
  [ "$(stat -Lc %i /dev/fd/9)" = "$(stat -c %i "$state" 2> /dev/null)" ] || lock_state
}

# -- configuration

write_configuration() {
  local i
  # Written first, because a directory is recognised as a cluster by this file.
  printf '%s\n' "NODES=$NODES" "GPUS=$GPUS" "CPUS=$CPUS" "PORT=$PORT" > "$state/settings"
  mkdir -p "$state"/{bin,etc,gpu,jobs,log,pids,run/mark}
  chmod 755 "$state" "$state"/*/
  ln -sfn "$(type -P slurmdbd)" "$state/bin/slurmdbd"
  for ((i = 0; i < GPUS; i++)); do
    ln -sfn /dev/null "$state/gpu/$i"
  done
  if [ ! -s "$state/etc/munge.key" ]; then
    (umask 077 && head -c 1024 /dev/urandom > "$state/etc/munge.key")
  fi

  cat > "$state/etc/slurm.conf" << CONF
ClusterName=development
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$PORT
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until the credentials of its first start expire.
AuthInfo=socket=$state/run/munge.socket,cred_expire=5
StateSaveLocation=$state/jobs
SlurmdSpoolDir=$state/run/%n
SlurmctldPidFile=$state/run/slurmctld.pid
SlurmdPidFile=$state/run/%n.pid
SlurmctldLogFile=$state/log/slurmctld.log
SlurmdLogFile=$state/log/%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog=$state/etc/task-prolog
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1

SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
MaxArraySize=10001

SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=2
OverTimeLimit=0
MinJobAge=300
BatchStartTimeout=10
SlurmdTimeout=10
ReturnToService=1

AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PORT + 1))
AccountingStoragePass=$state/run/munge.socket
AccountingStorageTRES=gres/gpu

$(for ((i = 1; i <= NODES; i++)); do
    echo "NodeName=node$i NodeHostname=node$i NodeAddr=127.0.0.1 Port=$((PORT + 10 + i))" \
      "CPUs=$CPUS RealMemory=1000000 Gres=gpu:$GPUS"
  done)
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
CONF

  echo "NodeName=node[1-$NODES] Name=gpu File=$state/gpu/[0-$((GPUS - 1))]" > "$state/etc/gres.conf"
  # From 23.11 on, slurmd looks for control groups even if no plugin uses them.
  if [ "$(slurmctld -V | grep -o '[0-9]*' | head -n 2 | paste -sd '' -)" -ge 2311 ]; then
    echo "CgroupPlugin=disabled" > "$state/etc/cgroup.conf"
  fi

  (umask 077 && cat > "$state/etc/slurmdbd.conf") << CONF
AuthType=auth/munge
AuthInfo=socket=$state/run/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((PORT + 1))
SlurmUser=root
PidFile=$state/run/slurmdbd.pid
LogFile=$state/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
CONF

  # Slurm builds a job's environment from the submitter's; this adds the mark to it.
  printf '%s\n' '#!/bin/sh' "echo export $mark" > "$state/etc/task-prolog"
  chmod 755 "$state/etc/task-prolog"
}

# -- daemons: each runs in the foreground of its own session, with its process id in pids/NAME

daemons() { printf '%s\n' munged mariadbd slurmdbd slurmctld $(seq -f 'node%g' "$NODES"); }

pid_of() { # prints the id of a running daemon; ids are reused, so its command line must contain the state directory
  local pid
  pid=$(cat "$state/pids/$1" 2> /dev/null) && [ -n "$pid" ] || return 1
  grep -qzF -- "$state/" "/proc/$pid/cmdline" 2> /dev/null || return 1
  echo "$pid"
}

launch() { # launch NAME COMMAND ...
  local name=$1
  shift
  say "starting $name"
  (
    exec 9<&-
    cd /
    echo "$BASHPID" > "$state/pids/$name"
    exec env -i "PATH=$PATH" LANG=C.UTF-8 "$mark" "SLURM_CONF=$SLURM_CONF" "MYSQL_UNIX_PORT=$state/run/mysql.socket" \
      setsid "$@"
  ) < /dev/null >> "$state/log/$name.out" 2>&1 &
  started[$name]=$!
}

wait_for() { # wait_for NAME COMMAND ...: wait until the command succeeds; fail if the daemon ends or takes too long
  local name=$1 end=$((SECONDS + 60))
  shift
  until "$@" > /dev/null 2>&1; do
    if [ -n "${started[$name]:-}" ] && ! kill -0 "${started[$name]}" 2> /dev/null; then
      fail "$name" "$name has ended"
    fi
    [ $SECONDS -lt $end ] || fail "$name" "$name does not answer ($*)"
    sleep 0.05
  done
}

start_munged() {
  launch munged munged --foreground --force --key-file="$state/etc/munge.key" --socket="$state/run/munge.socket" \
    --pid-file="$state/run/munged.pid" --seed-file="$state/run/munged.seed" --log-file="$state/log/munged.log"
}

start_mariadbd() {
  if [ ! -d "$state/database/mysql" ]; then
    rm -rf "$state/database.part"
    mariadb-install-db --no-defaults --user=root --datadir="$state/database.part" --skip-test-db --skip-name-resolve \
      --auth-root-authentication-method=socket --auth-root-socket-user=root > "$state/log/mariadbd.out" 2>&1 \
      || fail mariadbd "mariadb-install-db failed"
    mv "$state/database.part" "$state/database"
  fi
  rm -f "$state/run/mysql.socket"
  launch mariadbd mariadbd --no-defaults --user=root --datadir="$state/database" --socket="$state/run/mysql.socket" \
    --pid-file="$state/run/mariadbd.pid" --skip-networking --innodb-buffer-pool-size=64M --innodb-log-file-size=8M \
    --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=2
}

start_slurmdbd() { launch slurmdbd "$state/bin/slurmdbd" -D; }

start_slurmctld() { launch slurmctld slurmctld -D -f "$SLURM_CONF"; }

start_node() { # start_node NAME
  local private=()
  # With namespaces, a node has its own host name, its jobs can resolve all nodes, and an empty mounted file system,
  # visible only to them, marks all processes that they start.
  if [ "$namespaces" = yes ]; then
    private=(unshare --mount --uts --propagation private sh -ec
      'mount --bind "$1" /etc/hosts; mount -t tmpfs "$2" "$3"; hostname "$4"; shift 4; exec "$@"' sh
      "$state/etc/hosts" "$mark" "$state/run/mark" "$1")
  fi
  launch "$1" "${private[@]}" slurmd -D -f "$SLURM_CONF" -N "$1"
}

# -- names of the nodes

host_line() { echo "127.0.0.1 $(seq -f 'node%g' -s ' ' "$NODES") # $mark"; }

without_host_line() { grep -vF "# $mark" /etc/hosts || true; }

name_nodes() {
  exec 8< /etc/hosts
  flock 8
  { without_host_line; host_line; } > "$state/etc/hosts"
  # In a container without permission to create namespaces, the machine's own /etc/hosts has to list the nodes.
  if unshare --mount --uts --propagation private mount --bind "$state/etc/hosts" /etc/hosts 2> /dev/null; then
    namespaces=yes
  else
    namespaces=no
    say "no right to make namespaces: adding the nodes to /etc/hosts, until \`down\`"
    cp "$state/etc/hosts" /etc/hosts
  fi
  exec 8<&-
}

forget_nodes() {
  exec 8< /etc/hosts
  flock 8
  if grep -qF "# $mark" /etc/hosts; then
    without_host_line > "$state/hosts"
    cp "$state/hosts" /etc/hosts
  fi
  exec 8<&-
}

# -- commands

port_of() { # port_of NAME
  case $1 in
    slurmctld) echo "$PORT" ;;
    slurmdbd) echo $((PORT + 1)) ;;
    node*) echo $((PORT + 10 + ${1#node})) ;;
  esac
}

has_cluster() { [ "$(sacctmgr -nP list cluster development format=cluster)" = development ]; }

usable_nodes() { sinfo -h -N -p gpu -o %T | grep -cxE 'idle|mixed|allocated|completing'; }

all_nodes_usable() { [ "$(usable_nodes)" = "$NODES" ]; }

up() {
  local name port
  local -A missing=() started=()
  check_state_directory
  read_settings
  install_packages
  lock_state
  read_settings # another `up` may have created the cluster in the meantime
  for name in $(daemons); do
    if ! pid_of "$name" > /dev/null; then
      missing[$name]=yes
      port=$(port_of "$name")
      if [ -n "$port" ] && listens "$port"; then
        rmdir --ignore-fail-on-non-empty "$state"
        fail "$name" "port $port, for $name, is in use: choose another DEV_SLURM_PORT, such as $((PORT + 1000))"
      fi
    fi
  done
  [ ${#missing[@]} = 0 ] || write_configuration

  [ -z "${missing[munged]:-}" ] || start_munged
  [ -z "${missing[mariadbd]:-}" ] || start_mariadbd
  wait_for munged munge -n -S "$state/run/munge.socket"
  wait_for mariadbd [ -S "$state/run/mysql.socket" ]
  [ -z "${missing[slurmdbd]:-}" ] || start_slurmdbd
  wait_for slurmdbd sacctmgr -n list cluster
  has_cluster || sacctmgr -i add cluster development > /dev/null
  [ -z "${missing[slurmctld]:-}" ] || start_slurmctld
  wait_for slurmctld scontrol ping
  name_nodes
  for name in $(daemons | grep node); do
    [ -z "${missing[$name]:-}" ] || start_node "$name"
  done
  for name in $(daemons | grep node); do
    wait_for "$name" listens "$(port_of "$name")"
  done
  for name in $(sinfo -h -N -p gpu -o '%N %T' | sed -nE 's/^(\S+) (down|drain|fail).*/\1/p'); do
    scontrol update "nodename=$name" state=resume
  done
  wait_for slurmctld all_nodes_usable
  say "$NODES nodes with $CPUS CPUs and $GPUS fake GPUs each are ready"
  echo "export SLURM_CONF=$SLURM_CONF"
}

our_processes() { # prints the ids of all processes of the cluster
  local name
  for name in $(daemons); do
    pid_of "$name" || true
  done
  {
    grep -lzxF -- "$mark" /proc/[0-9]*/environ || true
    grep -lF -- " $mark " /proc/[0-9]*/mountinfo || true
  } 2> /dev/null | cut -d/ -f3
}

down() { # down [--keep]
  local name pids end=$((SECONDS + 30))
  check_state_directory
  if [ ! -e "$state" ]; then
    say "there is no cluster in $state"
    return
  fi
  [ "$UID" = 0 ] || refuse "only root can end the cluster in $state."
  [ "${DEV_SLURM_CLUSTER:-}" != "$state" ] || refuse "a job of the cluster in $state cannot end it."
  lock_state
  read_settings
  if [ "${1:-}" = --keep ]; then
    # In this order, because each daemon passes its state on to the next. Running jobs are lost with their nodes, and
    # requeued.
    for name in slurmctld slurmdbd mariadbd; do
      end_daemon "$name"
    done
  fi
  while pids=$(our_processes | sort -u | xargs) && [ -n "$pids" ]; do
    [ $SECONDS -lt $end ] || fail down "cannot kill these processes of the cluster: $pids"
    # shellcheck disable=SC2086 # one word per process
    kill -KILL $pids 2> /dev/null || true
    sleep 0.05
  done
  forget_nodes
  if [ "${1:-}" = --keep ]; then
    say "ended; \`up\` goes on with the queue and the accounting in $state"
  else
    # The settings are deleted last, because a directory is recognised as a cluster by them.
    find "$state" -mindepth 1 -maxdepth 1 ! -name settings -exec rm -rf {} +
    rm -r "$state"
    say "ended and deleted $state"
  fi
}

end_daemon() { # end_daemon NAME: with SIGTERM, so that it can save its state
  local pid end=$((SECONDS + 20))
  pid=$(pid_of "$1") || return 0
  kill "$pid"
  while pid_of "$1" > /dev/null && [ $SECONDS -lt $end ]; do
    sleep 0.05
  done
}

status() {
  local name pid usable=yes
  if [ ! -f "$state/settings" ]; then
    echo "There is no cluster in $state."
    return 1
  fi
  read_settings
  for name in $(daemons); do
    if pid=$(pid_of "$name"); then
      echo "$name runs as process $pid"
    else
      echo "$name DOES NOT RUN"
      usable=no
    fi
  done
  echo
  # Without these daemons, the commands would retry for a minute.
  if pid_of munged > /dev/null && pid_of slurmctld > /dev/null; then
    timeout 20 sinfo -N -l && echo && timeout 20 squeue && [ "$(usable_nodes)" -gt 0 ] || usable=no
  fi
  if [ "$usable" = yes ]; then
    timeout 20 sacctmgr -n list cluster > /dev/null || usable=no
  fi
  echo
  if [ "$usable" = no ]; then
    echo "The cluster in $state is not usable: \`$0 up\` repairs it, \`$0 down\` ends it."
    return 1
  fi
  echo "usable: export SLURM_CONF=$SLURM_CONF"
}

# Variables for Slurm's commands, set by a job or for another cluster, must not affect this cluster's commands.
for variable in "${!SLURM_@}" "${!SBATCH_@}" "${!SACCT_@}" "${!SQUEUE_@}" "${!SINFO_@}"; do
  unset "$variable"
done
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$state/etc/slurm.conf
umask 022
case "$*" in
  up) up ;;
  down | "down --keep") down "${2:-}" ;;
  status) status ;;
  -h | --help) usage ;;
  *)
    usage >&2
    exit 2
    ;;
esac
