// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// ContainerdPaths is what a containerd's configuration needs to know of its node. A function of
// [Options.ContainerdConfig] may change it before it writes the file.
type ContainerdPaths struct {
	// Root, State and Socket are containerd's own; Imports is the file pattern of
	// [Options.ContainerdExtra].
	Root, State, Socket, Imports string
	// SandboxImage is on the bed's registry.
	SandboxImage string
	// RegistryConfig is config_path of the registry section: one directory or, joined by colons,
	// several. Empty leaves the key out, which mirrors in the file itself need.
	RegistryConfig string
	// Registry is host:port of the bed's registry.
	Registry string
	// Bin holds runc and the CNI plugins, CNI their configuration, CDI the device specifications.
	Bin, CNI, CDI string
	// NodeDir and RunDir are for everything that has a default on the host.
	NodeDir, RunDir string
}

func (n *Node) containerdPaths() ContainerdPaths {
	return ContainerdPaths{
		Root: filepath.Join(n.NodeDir, "containerd"), State: filepath.Join(n.RunDir, "containerd"),
		Socket:  n.RuntimeSocket,
		Imports: filepath.Join(n.etc("containerd.d"), "*.toml"), SandboxImage: n.bed.Image(pauseImage),
		RegistryConfig: n.RegistryHostsDir(), Registry: n.bed.Registry,
		Bin: n.bed.Bin, CNI: n.etc("cni"), CDI: filepath.Join(n.RunDir, "cdi"), NodeDir: n.NodeDir, RunDir: n.RunDir,
	}
}

// registryConfig is the line of config_path, empty without one.
func (p ContainerdPaths) registryConfig() string {
	if p.RegistryConfig == "" {
		return ""
	}
	return fmt.Sprintf("config_path = %q", p.RegistryConfig)
}

// fill replaces ${NAME} in a configuration.
func (p ContainerdPaths) fill(config string) string {
	quoted := func(elem ...string) string { return fmt.Sprintf("%q", filepath.Join(elem...)) }
	return strings.NewReplacer(
		"${ROOT}", quoted(p.Root), "${STATE}", quoted(p.State), "${SOCKET}", quoted(p.Socket), "${IMPORTS}",
		quoted(p.Imports),
		"${SANDBOX}", quoted(p.SandboxImage), "${CONFIG_PATH}", p.registryConfig(), "${BIN}", quoted(p.Bin), "${CNI}",
		quoted(p.CNI),
		"${CDI}", quoted(p.CDI), "${RUNC}", quoted(p.Bin, "runc"), "${RUNC_ROOT}", quoted(p.RunDir, "runc"),
		"${OPT}", quoted(p.NodeDir, "opt"), "${SHIMS}", quoted(p.RunDir, "s"), "${NRI_SOCKET}",
		quoted(p.RunDir, "nri.sock"),
		"${NRI_PLUGINS}", quoted(p.NodeDir, "nri", "plugins"), "${NRI_CONFIG}", quoted(p.NodeDir, "nri", "conf.d"),
	).Replace(config)
}

// ContainerdV3 is the bed's configuration, in version 3, which containerd has since 2.0. Tables
// that it does not have may be appended. Every path that has a default on the host is moved into
// the bed.
func ContainerdV3(p ContainerdPaths) string {
	return p.fill(`version = 3
root = ${ROOT}
state = ${STATE}
oom_score = 0
imports = [${IMPORTS}]
[grpc]
  address = ${SOCKET}
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = ${SANDBOX}
  [plugins."io.containerd.cri.v1.images".registry]
    ${CONFIG_PATH}
[plugins."io.containerd.cri.v1.runtime"]
  # Machines without CAP_SYS_RESOURCE cannot lower a score.
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  cdi_spec_dirs = [${CDI}]
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = [${BIN}]
    conf_dir = ${CNI}
    # The loopback plugin leaves its result in /var/lib/cni for ever.
    use_internal_loopback = true
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
      BinaryName = ${RUNC}
      Root = ${RUNC_ROOT}
      SystemdCgroup = false
[plugins."io.containerd.internal.v1.opt"]
  path = ${OPT}
[plugins."io.containerd.shim.v1.manager"]
  socket_dir = ${SHIMS}
[plugins."io.containerd.nri.v1.nri"]
  socket_path = ${NRI_SOCKET}
  plugin_path = ${NRI_PLUGINS}
  plugin_config_path = ${NRI_CONFIG}
[plugins."io.containerd.transfer.v1.local"]
  ${CONFIG_PATH}
`)
}

// ContainerdV2 is the same in version 2, the only one that containerd 1.7 reads and the one that
// most nodes have; containerd 2 migrates it. Tables that it does not have may be appended, such as
//
//	[plugins."io.containerd.grpc.v1.cri".registry.mirrors."docker.io"]
//	  endpoint = ["http://198.18.0.1:5000"]
//
// after RegistryConfig has been emptied, and [plugins."io.containerd.grpc.v1.cri".containerd] with
// discard_unpacked_layers.
func ContainerdV2(p ContainerdPaths) string {
	return p.fill(`version = 2
root = ${ROOT}
state = ${STATE}
oom_score = 0
imports = [${IMPORTS}]
[grpc]
  address = ${SOCKET}
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = ${SANDBOX}
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  enable_cdi = true
  cdi_spec_dirs = [${CDI}]
  [plugins."io.containerd.grpc.v1.cri".registry]
    ${CONFIG_PATH}
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = ${BIN}
    conf_dir = ${CNI}
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      BinaryName = ${RUNC}
      Root = ${RUNC_ROOT}
      SystemdCgroup = false
[plugins."io.containerd.internal.v1.opt"]
  path = ${OPT}
[plugins."io.containerd.nri.v1.nri"]
  socket_path = ${NRI_SOCKET}
  plugin_path = ${NRI_PLUGINS}
  plugin_config_path = ${NRI_CONFIG}
`)
}

// configVersion is the version of a containerd configuration; a file without one has 1.
var configVersion = regexp.MustCompile(`(?m)^version\s*=\s*\d+`)

// writeContainerd writes containerd's configuration.
func (n *Node) writeContainerd() error {
	o := n.bed.options
	write := o.ContainerdConfig
	if write == nil {
		write = ContainerdV3
		if o.Containerd17 {
			write = ContainerdV2
		}
	}
	p := n.containerdPaths()
	config := write(p)
	if err := os.MkdirAll(p.CDI, 0o755); err != nil {
		return err
	}
	if o.ContainerdExtra != "" {
		// containerd 1.7 merges files of its own version only.
		extra := cmp.Or(configVersion.FindString(config), "version = 1") + "\n" + o.ContainerdExtra
		if err := os.WriteFile(filepath.Join(n.etc("containerd.d"), "extra.toml"), []byte(extra), 0o644); err != nil {
			return err
		}
	}
	return os.WriteFile(n.ContainerdConfigFile(), []byte(config), 0o644)
}

// ContainerdConfigFile is containerd's configuration; a test may edit it before StartContainerd.
func (n *Node) ContainerdConfigFile() string { return n.etc("containerd.toml") }
