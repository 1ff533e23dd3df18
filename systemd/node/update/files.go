// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package update

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
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

// install copies the binary into its version's directory, which is named after what it says of itself and what is in it, and
// returns the version. A binary that is there already stays.
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
	if err := os.MkdirAll(l.version(version), 0o755); err != nil {
		return "", err
	}
	dst, err := os.CreateTemp(l.version(version), ".cri-proxy-*")
	if err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(dst.Name())
		}
	}()
	_, err = io.Copy(dst, src)
	if err = errors.Join(err, dst.Chmod(0o755), dst.Sync(), dst.Close()); err != nil {
		return "", fmt.Errorf("installing %s: %w", binary, err)
	}
	return version, os.Rename(dst.Name(), l.binary(version))
}

// link makes a symlink in one step, and the directory that it is in.
func link(to, path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	temporary := fmt.Sprintf("%s.%d", path, os.Getpid())
	if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(to, temporary); err != nil {
		return err
	}
	return os.Rename(temporary, path)
}

// use makes an instance run a version; "" takes its link away.
func (l layout) use(instance, version string) error {
	if version == "" {
		if err := os.Remove(l.instance(instance)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
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
