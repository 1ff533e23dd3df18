// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// modulePath tells the checkout of this project from another module around the working directory.
const modulePath = "github.com/cri-proxy/cri-proxy"

// kubernetesVersion is stamped into the Kubernetes binaries: they refuse each other without one. It
// must be the version that test/components/kubernetes/go.mod requires (a test checks it).
const kubernetesVersion = "v1.37.2"

// component is one pinned module below test/components and the programs built from it.
type component struct {
	dir      string
	programs map[string]string // binary name: package
	tests    map[string]string // likewise, for programs that are a package's tests
	tags     string
	ldflags  string
	cluster  bool // only a Cluster bed needs it
}

func components() []component {
	const (
		containerd = "github.com/containerd/containerd/v2/cmd/"
		plugins    = "github.com/containernetworking/plugins/plugins/"
		kubernetes = "k8s.io/kubernetes/cmd/"
		version    = "-X k8s.io/component-base/version."
	)
	minor := strings.Split(kubernetesVersion, ".")[1]
	return []component{
		{dir: "containerd", programs: map[string]string{
			"containerd": containerd + "containerd", "containerd-shim-runc-v2": containerd + "containerd-shim-runc-v2",
			"ctr": containerd + "ctr",
		}},
		// CRI's seccomp profiles need libseccomp.
		{dir: "runc", programs: map[string]string{"runc": "github.com/opencontainers/runc"}, tags: "seccomp"},
		{dir: "cni", programs: map[string]string{
			"bridge": plugins + "main/bridge", "loopback": plugins + "main/loopback", "host-local": plugins +
				"ipam/host-local", "portmap": plugins + "meta/portmap",
		}},
		{dir: "registry",
			programs: map[string]string{"registry": "github.com/distribution/distribution/v3/cmd/registry"}},
		{dir: "crane", programs: map[string]string{"crane": "github.com/google/go-containerregistry/cmd/crane"}},
		{dir: "cri-tools", programs: map[string]string{"crictl": "sigs.k8s.io/cri-tools/cmd/crictl"},
			tests: map[string]string{"critest": "sigs.k8s.io/cri-tools/cmd/critest"}},
		{dir: "etcd", programs: map[string]string{"etcd": "go.etcd.io/etcd/server/v3"}, cluster: true},
		{dir: "kubernetes", programs: map[string]string{
			"kube-apiserver": kubernetes + "kube-apiserver", "kube-controller-manager": kubernetes +
				"kube-controller-manager",
			"kube-scheduler": kubernetes + "kube-scheduler", "kubelet": kubernetes + "kubelet", "kubectl": kubernetes +
				"kubectl",
		}, ldflags: version + "gitVersion=" + kubernetesVersion + " " + version + "gitMajor=1 " + version +
			"gitMinor=" + minor, cluster: true},
	}
}

// containerd17 is the older release that nodes still run. It is no part of [components]: only beds
// that ask for it build it.
func containerd17() component {
	const cmd = "github.com/containerd/containerd/cmd/"
	return component{dir: "containerd17", programs: map[string]string{
		"containerd": cmd + "containerd", "containerd-shim-runc-v2": cmd + "containerd-shim-runc-v2",
		"ctr": cmd + "ctr",
	}}
}

// CacheDir is where built components, images and the beds' own directories live: $CRI_PROXY_CACHE,
// else $XDG_CACHE_HOME/cri-proxy, else ~/.cache/cri-proxy. Never below /tmp: tmpfs has no overlayfs
// upper directories on old kernels and machines empty it.
func CacheDir() (string, error) {
	dir := os.Getenv("CRI_PROXY_CACHE")
	if dir == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			return "", fmt.Errorf("no place for the component cache: %w; set CRI_PROXY_CACHE to a directory", err)
		}
		dir = filepath.Join(base, "cri-proxy")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	return dir, os.MkdirAll(dir, 0o755)
}

// SourceDir returns the root of the checkout around dir (the working directory when empty).
func SourceDir(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	for d := dir; ; d = filepath.Dir(d) {
		if b, err := os.ReadFile(filepath.Join(d, "go.mod")); err == nil {
			if first, _, _ := strings.Cut(string(b), "\n"); strings.TrimSpace(first) == "module "+modulePath {
				return d, nil
			}
		}
		if d == filepath.Dir(d) {
			return "", fmt.Errorf("%s is not inside a checkout of %s: run from there or set Source", dir, modulePath)
		}
	}
}

// lockFile takes an exclusive lock that ends with unlock or with this process.
func lockFile(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	err = poll(ctx, func() error {
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			return fmt.Errorf("lock %s, held by another run: %w", path, err)
		}
		return nil
	})
	if err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

func goVersion(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOVERSION", "GOOS", "GOARCH").Output()
	if err != nil {
		return "", fmt.Errorf("the Go toolchain is needed to build the components: %w", err)
	}
	return string(out), nil
}

// hash is short enough for a path and long enough to be unique.
func hash(parts ...string) string {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:", len(p))
		io.WriteString(h, p)
	}
	return hex.EncodeToString(h.Sum(nil))[:16]
}

// Build builds the pinned components that mode needs into the cache, unless they are there, and
// returns a directory of symlinks to all programs. Missing Debian packages are installed first.
// Parallel callers build once. Progress goes to log, one line per step. source is any directory of
// the checkout, the working directory when empty.
func Build(ctx context.Context, source string, mode Mode, log io.Writer) (string, error) {
	if err := installPackages(ctx, log); err != nil {
		return "", err
	}
	source, err := SourceDir(source)
	if err != nil {
		return "", err
	}
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	version, err := goVersion(ctx)
	if err != nil {
		return "", err
	}
	store := filepath.Join(cache, "components")
	if err := os.MkdirAll(store, 0o755); err != nil {
		return "", err
	}
	links := map[string]string{}
	var keys []string
	for _, c := range components() {
		if c.cluster && mode != ModeCluster {
			continue
		}
		dir, err := c.build(ctx, filepath.Join(source, "test", "components", c.dir), store, version, log)
		if err != nil {
			return "", err
		}
		keys = append(keys, dir)
		for _, name := range c.names() {
			links[name] = filepath.Join(dir, name)
		}
	}
	bin := filepath.Join(store, "bin-"+hash(keys...))
	return bin, linkAll(bin, links)
}

// buildContainerd17 builds containerd 1.7 into the cache, unless it is there, and returns its
// programs as [Options.ComponentBin] takes them.
func buildContainerd17(ctx context.Context, source string, log io.Writer) (map[string]string, error) {
	cache, err := CacheDir()
	if err != nil {
		return nil, err
	}
	version, err := goVersion(ctx)
	if err != nil {
		return nil, err
	}
	c := containerd17()
	dir, err := c.build(ctx, filepath.Join(source, "test", "components", c.dir), filepath.Join(cache, "components"),
		version, log)
	if err != nil {
		return nil, err
	}
	bin := map[string]string{}
	for _, name := range c.names() {
		bin[name] = filepath.Join(dir, name)
	}
	return bin, nil
}

// linkAll makes dir, holding the given symlinks, appear in one step.
func linkAll(dir string, links map[string]string) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".tmp-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	for name, target := range links {
		if err := os.Symlink(target, filepath.Join(tmp, name)); err != nil {
			return err
		}
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	if err := os.Rename(tmp, dir); err != nil && !errors.Is(err, os.ErrExist) && !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	return nil
}

// build compiles one component unless the store has it, keyed by its module files, the flags and
// the Go version.
func (c component) build(ctx context.Context, module, store, goVersion string, log io.Writer) (string, error) {
	var key []string
	for _, f := range []string{"go.mod", "go.sum"} {
		b, err := os.ReadFile(filepath.Join(module, f))
		if err != nil {
			return "", fmt.Errorf("component %s: %w", c.dir, err)
		}
		key = append(key, string(b))
	}
	key = append(key, fmt.Sprintf("%v", c), goVersion)
	dir := filepath.Join(store, c.dir+"-"+hash(key...))
	if err := c.removeUnfinished(store); err != nil {
		return "", fmt.Errorf("component %s: %w", c.dir, err)
	}
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	unlock, err := lockFile(ctx, c.lock(store))
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(dir); err == nil {
		return dir, nil // built while we waited
	}
	tmp, err := os.MkdirTemp(store, c.unfinished())
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	began := time.Now()
	fmt.Fprintf(log, "build component %s, for this version once ...\n", c.dir)
	for name, pkg := range c.programs {
		if err := c.compile(ctx, module, filepath.Join(tmp, name), pkg, "build"); err != nil {
			return "", err
		}
	}
	for name, pkg := range c.tests {
		if err := c.compile(ctx, module, filepath.Join(tmp, name), pkg, "test", "-c"); err != nil {
			return "", err
		}
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return "", err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return "", err
	}
	fmt.Fprintf(log, "build %s: %.1fs\n", c.dir, time.Since(began).Seconds())
	return dir, nil
}

// names are those of all programs.
func (c component) names() []string {
	return slices.Concat(slices.Collect(maps.Keys(c.programs)), slices.Collect(maps.Keys(c.tests)))
}

// compile runs a go subcommand that writes pkg's binary to out.
func (c component) compile(ctx context.Context, module, out, pkg string, subcommand ...string) error {
	args := slices.Concat(subcommand, []string{"-ldflags", "-s -w " + c.ldflags, "-o", out})
	if c.tags != "" {
		args = append(args, "-tags", c.tags)
	}
	// GOFLAGS of the caller must not touch the checked-in module files. The working directory of a
	// build that is killed is removed with the directory of its programs.
	env := []string{
		"GOFLAGS=-mod=readonly -buildvcs=false", "GOWORK=off", "CGO_ENABLED=1", "GOTMPDIR=" + filepath.Dir(out),
	}
	if msg, err := goCommand(ctx, module, env, append(args, pkg)...); err != nil {
		return fmt.Errorf("build %s of component %s: %w\n%s", filepath.Base(out), c.dir, err, msg)
	}
	return nil
}

// BuildWithFailpoints compiles the checkout's cri-proxy with the race detector and the failpoints
// of ops/failpoint to dst.
func BuildWithFailpoints(ctx context.Context, dst string) error {
	source, err := SourceDir("")
	if err != nil {
		return err
	}
	return buildProduct(ctx, source, "cri-proxy", dst, "-race", "-tags", "failpoint")
}

// BuildCommitWithFailpoints is [BuildWithFailpoints] for another commit of this repository, given
// by its full hash. The sources of the commit are kept in the cache.
func BuildCommitWithFailpoints(ctx context.Context, commit, dst string) error {
	source, err := sourceOf(ctx, commit)
	if err != nil {
		return err
	}
	return buildProduct(ctx, source, "cri-proxy", dst, "-race", "-tags", "failpoint")
}

// sourceOf returns a directory with the sources of the commit.
func sourceOf(ctx context.Context, commit string) (string, error) {
	checkout, err := SourceDir("")
	if err != nil {
		return "", err
	}
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "source", commit)
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".tmp-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	archive := filepath.Join(tmp, "archive.tar")
	// The checkout may belong to another user than the one who runs the tests.
	git := func(args ...string) ([]byte, error) {
		args = append([]string{"-c", "safe.directory=*", "-C", checkout}, args...)
		return exec.CommandContext(ctx, "git", args...).CombinedOutput()
	}
	out, err := git("archive", "--output", archive, commit)
	if err != nil {
		// A shallow clone lacks the commit, and its origin has it.
		if _, fetchErr := git("fetch", "--quiet", "--unshallow"); fetchErr == nil {
			out, err = git("archive", "--output", archive, commit)
		}
	}
	if err != nil {
		return "", fmt.Errorf("commit %s is needed, and is not in the history of %s: %w\n%s"+
			"a shallow clone lacks it: run git fetch --unshallow, or set fetch-depth: 0 in the workflow",
			commit, checkout, err, out)
	}
	tree := filepath.Join(tmp, "tree")
	if err := os.Mkdir(tree, 0o755); err != nil {
		return "", err
	}
	if out, err := exec.CommandContext(ctx, "tar", "-xf", archive, "-C", tree).CombinedOutput(); err != nil {
		return "", fmt.Errorf("sources of commit %s: %w\n%s", commit, err, out)
	}
	if err := os.Rename(tree, dir); err != nil && !errors.Is(err, os.ErrExist) && !errors.Is(err, unix.ENOTEMPTY) {
		return "", err
	}
	return dir, nil
}

// buildProduct compiles one of the project's own commands with the flags and copies it to dst. The
// go command leaves an up-to-date binary alone, so it is kept in the cache per checkout, and copied
// because a later build may replace it under a running process.
func buildProduct(ctx context.Context, source, command, dst string, flags ...string) error {
	if _, err := os.Stat(filepath.Join(source, "cmd", command)); err != nil {
		return fmt.Errorf("this checkout has no cmd/%s yet: use a direct bed or give the path of a built binary: %w",
			command, err)
	}
	cache, err := CacheDir()
	if err != nil {
		return err
	}
	dir := filepath.Join(cache, "product", hash(append([]string{source}, flags...)...))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	unlock, err := lockFile(ctx, filepath.Join(dir, "."+command+".lock"))
	if err != nil {
		return err
	}
	defer unlock()
	args := slices.Concat([]string{"build", "-buildvcs=false", "-o", filepath.Join(dir, command)}, flags,
		[]string{"./cmd/" + command})
	if out, err := goCommand(ctx, source, nil, args...); err != nil {
		return fmt.Errorf("build %s from %s: %w\n%s", command, source, err, out)
	}
	return copyFile(filepath.Join(dir, command), dst)
}

// copyFile copies through a temporary name, so that a running dst is replaced and not written to.
func copyFile(src, dst string) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	st, err := in.Stat()
	if err != nil {
		return err
	}
	syscall.ForkLock.RLock() // a child with the open file would make it busy for who runs the copy
	defer syscall.ForkLock.RUnlock()
	out, err := os.CreateTemp(filepath.Dir(dst), ".tmp-*")
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	err = errors.Join(err, out.Chmod(st.Mode().Perm()), out.Close())
	if err == nil {
		err = os.Rename(out.Name(), dst)
	}
	if err != nil {
		_ = os.Remove(out.Name())
	}
	return err
}
