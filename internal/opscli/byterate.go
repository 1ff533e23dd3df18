// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package opscli

import (
	"fmt"
	"math"
	"regexp"
	"strconv"
	"strings"
)

// ByteRate is a number of bytes a second. As a flag it is written 20MiB/s, 500kB or 1048576. It
// implements [pflag.Value].
type ByteRate int64

var rateForm = regexp.MustCompile(`^([0-9]+(?:\.[0-9]+)?) ?([kKMG]i?)?B?(?:/s)?$`)

// Set implements [pflag.Value].
func (r *ByteRate) Set(s string) error {
	m := rateForm.FindStringSubmatch(s)
	if m == nil {
		return fmt.Errorf("%q: want bytes a second, such as 20MiB/s, 500kB/s or 1048576", s)
	}
	n, err := strconv.ParseFloat(m[1], 64)
	unit, binary := strings.CutSuffix(m[2], "i")
	base := 1000.0
	if binary {
		base = 1024
	}
	n *= math.Pow(base, float64(strings.Index("_KMG", strings.ToUpper(unit + "_")[:1])))
	if err != nil || n < 1 || n > 1<<50 {
		return fmt.Errorf("%q: want 1 byte a second or more", s)
	}
	*r = ByteRate(n)
	return nil
}

// String implements [pflag.Value].
func (r *ByteRate) String() string {
	if *r == 0 {
		return ""
	}
	return bytesText(int64(*r)) + "/s"
}

// Type implements [pflag.Value].
func (*ByteRate) Type() string { return "rate" }

// bytesText returns a size such as 1.5 GiB.
func bytesText(n int64) string {
	f, unit := float64(n), 0
	for f >= 1023.95 && unit < 4 {
		f, unit = f/1024, unit+1
	}
	if unit == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %ciB", f, " KMGT"[unit])
}
