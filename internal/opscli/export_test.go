// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package opscli

import (
	"io"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// What the commands show on a terminal only, or only as a part of more, has tests of its own.
var (
	Identity     = identity
	PhaseName    = phaseName
	ParseAuth    = parseAuth
	ReadAuthFile = readAuthFile
	ShellWord    = shellWord
)

// Screen returns the function that draws an operation on a terminal.
func Screen(p *Printer) func(*opsv1.Operation) error { return (&screen{p: p}).update }

// Bars returns the function that draws a pull on a terminal.
func Bars(out io.Writer, size func() (width, height int)) func(*opsv1.PullOperation) error {
	return (&bars{out: out, size: size}).update
}
