#!/bin/sh
# Runs the compiler command given after the first argument and keeps what ptxas says about registers, shared memory and
# spills in that directory, in a file named after the object.
directory=$1
shift
object=
previous=
for argument; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
report=$directory/$(basename "$object" .o).ptxas
mkdir -p "$directory"
"$@" 2>"$report"
status=$?
grep -v -e '^ptxas info' -e 'bytes stack frame' "$report" >&2
exit $status
