#!/usr/bin/env bash
# A C++ compiler that reads torch's headers once for all files of an extension; to read them is most of its time.
# GCC takes what was compiled beforehand from HEADER.gch, and reads the header itself where that does not fit a file.
#
# Usage: CXX=tools/cxx_with_header.sh MMSLAK_CXX=c++ MMSLAK_HEADER=/tmp/header.h pip wheel …
arguments=("$@") options=() is_source=
while [ $# -gt 0 ]; do
    case $1 in
    *.cpp) is_source=1 ;;
    -o | -MF) shift ;;
    -c | -MMD) ;;
    *) options+=("$1") ;;
    esac
    shift
done
if [ "$is_source" ] && command -v flock >/dev/null && $MMSLAK_CXX --version | grep -q 'Free Software'; then
    exec {lock}>"$MMSLAK_HEADER.lock"
    flock "$lock" # one of several jobs makes it
    if [ ! -e "$MMSLAK_HEADER" ]; then
        echo '#include <torch/types.h>' >"$MMSLAK_HEADER"
        $MMSLAK_CXX "${options[@]}" -x c++-header "$MMSLAK_HEADER" -o "$MMSLAK_HEADER.gch" || rm -f "$MMSLAK_HEADER.gch"
    fi
    exec {lock}>&-
    arguments+=(-include "$MMSLAK_HEADER")
fi
exec $MMSLAK_CXX "${arguments[@]}"
