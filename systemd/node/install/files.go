// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package install

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/systemd"
	"github.com/cri-proxy/cri-proxy/systemd/node/install/plan"
	"github.com/cri-proxy/cri-proxy/systemd/node/kubelet"
	"github.com/cri-proxy/cri-proxy/systemd/node/update"
)

const (
	// vendorUnitDir has the units of packages.
	vendorUnitDir     = "/usr/lib/systemd/system"
	tmpfilesName      = "cri-proxy.conf"
	tmpfilesDir       = "/etc/tmpfiles.d"
	vendorTmpfilesDir = "/usr/lib/tmpfiles.d"

	criSocket, adminSocket, opsSocket = "cri-proxy.socket", "cri-proxy-admin.socket", "cri-proxy-ops.socket"
	serviceTemplate                   = "cri-proxy@.service"
	// dropInName is the name of the drop-in with what the configuration changes of a unit.
	dropInName = "50-install.conf"

	dropInHead = "# Written by cri-proxy install from the configuration; changes go into a file of another name.\n"
	// opsListen is ListenStream= in the unit, as an address.
	opsListen = ":10260"
)

// guardFile is crash-guard, which the unit names.
func guardFile(prefix update.Prefix) string { return filepath.Join(prefix.LibDir(), "crash-guard") }

// shipped is a file of package systemd, for a prefix.
func shipped(name string, prefix update.Prefix) ([]byte, error) {
	b, err := systemd.File(name)
	if err != nil {
		return nil, err
	}
	for _, path := range []func(update.Prefix) string{update.Prefix.LibDir, update.Prefix.BinLink} {
		b = bytes.ReplaceAll(b, []byte(path(update.DefaultPrefix)), []byte(path(prefix)))
	}
	return b, nil
}

// prefixFile is the file that has the prefix, unless that is the default.
func prefixFile(prefix update.Prefix) file {
	f := file{path: update.PrefixFile, mode: 0o644}
	if prefix != update.DefaultPrefix {
		f.content = []byte(prefix + "\n")
	}
	return f
}

// file is a file of ours and its content. Nil content stands for no file.
type file struct {
	path    string
	content []byte
	mode    os.FileMode
}

// nodeFiles are all files of ours except the configuration and the binaries. k may be nil.
func nodeFiles(c *config.Config, k *kubelet.Kubelet, prefix update.Prefix) ([]file, error) {
	guard, err := shipped("crash-guard", prefix)
	if err != nil {
		return nil, err
	}
	out := []file{prefixFile(prefix), {guardFile(prefix), guard, 0o755}}
	tmpfiles, err := systemd.File("tmpfiles.conf")
	if err != nil {
		return nil, err
	}
	target, err := config.SocketPath(c.RuntimeEndpoint)
	if err != nil {
		return nil, err
	}
	def := config.Default()
	defTarget, err := config.SocketPath(def.RuntimeEndpoint)
	if err != nil {
		return nil, err
	}
	tmpfiles = bytes.ReplaceAll(tmpfiles, []byte(defTarget), []byte(target))
	tmpfiles = bytes.ReplaceAll(tmpfiles, []byte(filepath.Dir(def.Listen.Path)), []byte(filepath.Dir(c.Listen.Path)))
	moved := filepath.Join(filepath.Dir(c.Listen.Path), filepath.Base(def.Listen.Path))
	tmpfiles = bytes.ReplaceAll(tmpfiles, []byte(moved), []byte(c.Listen.Path))
	f, err := orVendor(tmpfilesDir, vendorTmpfilesDir, tmpfilesName, tmpfiles)
	if err != nil {
		return nil, err
	}
	out = append(out, f)
	for _, name := range []string{criSocket, adminSocket, opsSocket, serviceTemplate} {
		unit, err := shipped(name, prefix)
		if err != nil {
			return nil, err
		}
		f, err := orVendor(plan.UnitDir, vendorUnitDir, name, unit)
		if err != nil {
			return nil, err
		}
		out = append(out, f, file{filepath.Join(plan.UnitDir, name+".d", dropInName), unitChanges(name, c, k), 0o644})
	}
	return out, nil
}

// orVendor is a file in the administrator's directory. The file is not needed if a package has the
// same.
func orVendor(dir, vendor, name string, content []byte) (file, error) {
	f := file{filepath.Join(dir, name), content, 0o644}
	b, err := plan.Read(filepath.Join(vendor, name))
	if err == nil && b != nil && bytes.Equal(b, content) {
		f.content = nil
	}
	return f, err
}

// unitChanges is what the configuration changes of a unit, nil for nothing.
func unitChanges(name string, c *config.Config, k *kubelet.Kubelet) []byte {
	var lines []string
	def := config.Default()
	add := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	section := "[Socket]"
	switch name {
	case criSocket:
		if c.Listen.Path != def.Listen.Path {
			add("ListenStream=\nListenStream=%s", c.Listen.Path)
		}
		if c.Listen.Mode != def.Listen.Mode {
			add("SocketMode=%s", c.Listen.Mode)
		}
		if c.Listen.Owner != "" {
			add("SocketUser=%s", c.Listen.Owner)
		}
		if c.Listen.Group != "" {
			add("SocketGroup=%s", c.Listen.Group)
		}
	case adminSocket:
		if c.AdminSocket != def.AdminSocket {
			add("ListenStream=\nListenStream=%s", c.AdminSocket)
		}
	case opsSocket:
		if a := c.Ops.Address; a != "" && a != opsListen {
			add("ListenStream=\nListenStream=%s\nFreeBind=yes", listenStream(a))
		}
	case serviceTemplate:
		section = "[Service]"
		if c.Ops.Address != "" {
			add("Sockets=%s", opsSocket)
		}
		for _, dir := range writablePaths(c, k) {
			add("ReadWritePaths=-%s", dir)
		}
		if c.StateDir != def.StateDir {
			add("Environment=STATE_DIRECTORY=%s", c.StateDir)
		}
	}
	if len(lines) == 0 {
		return nil
	}
	return []byte(dropInHead + section + "\n" + strings.Join(lines, "\n") + "\n")
}

// listenStream is an address as systemd takes it.
func listenStream(address string) string {
	host, port, err := net.SplitHostPort(address)
	if err == nil && host == "" {
		return port
	}
	return address
}

// writablePaths are the paths that this node needs and that the unit does not make writable.
func writablePaths(c *config.Config, k *kubelet.Kubelet) []string {
	var out []string
	need := func(dir string, given ...string) {
		for _, g := range append(given, out...) {
			if dir == g || strings.HasPrefix(dir, g+"/") {
				return
			}
		}
		out = append(out, dir)
	}
	need(c.StateDir, config.Default().StateDir)
	if k != nil {
		need(k.RootDir(), "/run", "/var/run", "/var/lib/kubelet")
		need(k.PodLogsDir(), "/run", "/var/log")
	}
	if d := c.Restart.CDISpecDir; d != "" {
		need(d, "/run", "/var/run", "/etc/cdi")
	}
	return out
}
