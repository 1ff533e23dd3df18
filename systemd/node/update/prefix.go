// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package update

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// Prefix is the directory below which the binaries are, such as /usr/local.
type Prefix string

// DefaultPrefix is where they are unless the installation was told otherwise.
const DefaultPrefix Prefix = "/usr/local"

// PrefixFile says where they are if that is not [DefaultPrefix], for the commands that come after
// the installation.
const PrefixFile = "/etc/cri-proxy/prefix"

// LibDir holds the versions.
func (p Prefix) LibDir() string { return filepath.Join(string(p), "lib", "cri-proxy") }

// BinLink leads to the one that serves.
func (p Prefix) BinLink() string { return filepath.Join(string(p), "bin", "cri-proxy") }

// layout is that of what is installed below p.
func (p Prefix) layout() layout { return layout{lib: p.LibDir(), bin: p.BinLink()} }

// prefixForm is what stands for itself in units and scripts.
var prefixForm = regexp.MustCompile(`^(/[A-Za-z0-9_+][A-Za-z0-9._+-]*)+$`)

// Check returns an error if units and scripts cannot name it.
func (p Prefix) Check() error {
	if !prefixForm.MatchString(string(p)) {
		return fmt.Errorf("prefix %q: want an absolute path of letters, digits and ._+-, such as /opt", string(p))
	}
	return nil
}

// ReadPrefix returns what file says, [DefaultPrefix] if there is none.
func ReadPrefix(file string) (Prefix, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return DefaultPrefix, nil
	}
	if err != nil {
		return "", err
	}
	p := Prefix(strings.TrimSpace(string(b)))
	if err := p.Check(); err != nil {
		return "", fmt.Errorf("%s: %w", file, err)
	}
	return p, nil
}
