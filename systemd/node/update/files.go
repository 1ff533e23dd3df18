// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package update

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"

	"github.com/cri-proxy/cri-proxy/internal/atomicfile"
)

// layout is where the binaries are.
type layout struct {
	lib string // has versions/NAME/cri-proxy, and a symlink to a version for each instance
	bin string // what people call: a symlink to the version that serves
}

func (l layout) versions() string             { return filepath.Join(l.lib, "versions") }
func (l layout) instance(name string) string  { return filepath.Join(l.lib, name) }
func (l layout) version(name string) string   { return filepath.Join(l.versions(), name) }
func (l layout) binary(version string) string { return filepath.Join(l.version(version), "cri-proxy") }

// of returns the version that an instance runs, "" for none.
func (l layout) of(instance string) string {
	to, err := os.Readlink(l.instance(instance))
	if err != nil {
		return ""
	}
	return filepath.Base(to)
}

var oddBytes = regexp.MustCompile(`[^A-Za-z0-9._+-]+`)

// digest tells one binary from another.
func digest(binary string) (string, error) {
	f, err := os.Open(binary)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return "", fmt.Errorf("%s: %w", binary, err)
	}
	return fmt.Sprintf("%x", sum.Sum(nil)[:6]), nil
}

// install copies the binary into the directory of its version, and returns the version: what the
// binary says of itself, and a digest of its content. A binary that is there already stays.
func (l layout) install(binary, says string) (version string, err error) {
	src, err := os.Open(binary)
	if err != nil {
		return "", err
	}
	defer src.Close()
	sum, err := digest(binary)
	if err != nil {
		return "", err
	}
	version = oddBytes.ReplaceAllString(says, "_") + "-" + sum
	if _, err := os.Stat(l.binary(version)); err == nil {
		return version, nil
	}
	if err := atomicfile.Copy(l.binary(version), src, 0o755); err != nil {
		return "", fmt.Errorf("installing %s: %w", binary, err)
	}
	return version, nil
}

// link makes a symlink in one step, and the directory that it is in.
func link(to, path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return atomicfile.Symlink(to, path)
}

// use makes an instance run a version. With "" it removes the instance's link.
func (l layout) use(instance, version string) error {
	if version == "" {
		return atomicfile.Remove(l.instance(instance))
	}
	return link(filepath.Join("versions", version), l.instance(instance))
}

// tidy removes versions that no instance has.
func (l layout) tidy() error {
	all, err := os.ReadDir(l.versions())
	if err != nil {
		return err
	}
	used := map[string]bool{}
	for _, i := range instances() {
		used[l.of(i)] = true
	}
	var errs []error
	for _, v := range all {
		if !used[v.Name()] {
			errs = append(errs, os.RemoveAll(l.version(v.Name())))
		}
	}
	return errors.Join(errs...)
}
