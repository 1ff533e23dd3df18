// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"archive/tar"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// pauseImage is the sandbox image of every bed.
const pauseImage = "pause:3.10"

// Busybox and app versions that every bed's registry holds.
var (
	busyboxVersions = [...]string{"1.0", "2.0", "3.0"}
	appVersions     = [...]string{"1", "2", "3"}
)

// Users and groups of the busybox image; default-user and its second group are for critest.
const (
	passwd = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/:/bin/false\n" +
		"default-user:x:1000:1000::/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
	group = "root:x:0:\nwww-data:x:33:\ndefault-user:x:1000:\n" +
		"group-defined-in-image:x:50000:default-user\nnobody:x:65534:\n"
)

// seedRevision changes when the images change in a way that their sources do not show.
const seedRevision = "3"

// Image returns the full reference of an image of the bed's registry: pause:3.10,
// busybox:1.0|2.0|3.0, app:1|2|3, or what a test pushed. containerd takes names without a registry
// as well, for every registry's name leads here: busybox, app and nginx (which is app) in the same
// versions and as latest.
func (b *Bed) Image(name string) string { return b.Registry + "/" + name }

// seed returns a directory with a registry's storage that holds the test images, made once per
// content.
func seed(ctx context.Context, source, bin string, log io.Writer) (string, error) {
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	const busybox = "/bin/busybox"
	bb, err := os.ReadFile(busybox)
	if err != nil {
		return "", fmt.Errorf("the busybox image needs a static busybox (package busybox-static): %w", err)
	}
	version, err := goVersion(ctx)
	if err != nil {
		return "", err
	}
	target, err := os.Readlink(filepath.Join(bin, "crane"))
	if err != nil {
		return "", err
	}
	key := []string{seedRevision, version, string(bb), target}
	images := filepath.Join(source, "test", "images")
	for _, f := range []string{"app/main.go", "pause/main.go"} {
		b, err := os.ReadFile(filepath.Join(images, f))
		if err != nil {
			return "", err
		}
		key = append(key, string(b))
	}
	root := filepath.Join(cache, "images")
	if err := os.MkdirAll(root, 0o755); err != nil {
		return "", err
	}
	dir := filepath.Join(root, hash(key...))
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	unlock, err := lockFile(ctx, filepath.Join(root, ".lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	began := time.Now()
	fmt.Fprintf(log, "make the test images ...\n")
	tmp, err := os.MkdirTemp(root, ".tmp-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	m := imageMaker{source: source, bin: bin, work: tmp}
	if err := m.make(ctx, busybox, bb); err != nil {
		return "", fmt.Errorf("make the test images: %w", err)
	}
	if err := os.Rename(filepath.Join(tmp, "registry"), dir); err != nil {
		return "", err
	}
	fmt.Fprintf(log, "make the test images: %.1fs\n", time.Since(began).Seconds())
	return dir, nil
}

// PushLargeImage pushes app:1 under a new name (such as big:1) with layers of random bytes on top,
// mib MiB each, for tests of pulls that take time.
func (b *Bed) PushLargeImage(ctx context.Context, name string, layers, mib int) error {
	dir, err := os.MkdirTemp(b.Dir, "image-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	files := make([]string, layers)
	for i := range files {
		data := make([]byte, mib<<20)
		_, _ = rand.Read(data) // never fails
		files[i] = filepath.Join(dir, fmt.Sprintf("%d.tar", i))
		if err := writeTar(files[i],
			[]tarEntry{{name: fmt.Sprintf("filler/%d", i), data: data, mode: 0o644}}); err != nil {
			return err
		}
	}
	return pushImage(ctx, b.Bin, b.Registry, "app:1", name, files)
}

type imageMaker struct{ source, bin, work, registry string }

// make runs a registry on work/registry and pushes all images into it.
func (m *imageMaker) make(ctx context.Context, busybox string, bb []byte) (err error) {
	sp := newSpawner(true)
	defer sp.close()
	port, err := freePort("127.0.0.1", 0)
	if err != nil {
		return err
	}
	m.registry = fmt.Sprintf("127.0.0.1:%d", port)
	config := filepath.Join(m.work, "registry.yaml")
	if err := writeRegistry(config, m.registry, filepath.Join(m.work, "registry")); err != nil {
		return err
	}
	reg, err := sp.start(command{name: "registry", path: filepath.Join(m.bin, "registry"),
		args: []string{"serve", config}, log: filepath.Join(m.work, "registry.log")}, m.work)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, reg.stop(context.WithoutCancel(ctx), unix.SIGKILL)) }()
	if err := reg.ready(ctx, func(ctx context.Context) error { return registryAnswers(ctx, m.registry) }); err != nil {
		return err
	}

	list, err := exec.CommandContext(ctx, busybox, "--list").Output()
	if err != nil {
		return err
	}
	bbLayer := []tarEntry{{name: "bin/busybox", data: bb, mode: 0o755}, {name: "tmp/", mode: 0o1777},
		{name: "etc/", mode: 0o755},
		{name: "etc/passwd", data: []byte(passwd), mode: 0o644},
		{name: "etc/group", data: []byte(group), mode: 0o644}}
	for applet := range strings.FieldsSeq(string(list)) {
		if applet != "busybox" {
			bbLayer = append(bbLayer, tarEntry{name: "bin/" + applet, link: "busybox"})
		}
	}
	pause, err := m.compile(ctx, "pause", "")
	if err != nil {
		return err
	}
	if err := m.image(ctx, "", pauseImage, []tarEntry{{name: "pause", data: pause, mode: 0o755}}, "--entrypoint",
		"/pause"); err != nil {
		return err
	}
	for _, v := range busyboxVersions {
		layer := slices.Concat(bbLayer, []tarEntry{{name: "etc/version", data: []byte(v + "\n"), mode: 0o644}})
		if err := m.image(ctx, "", "busybox:"+v, layer, "--cmd", "sh", "--env", "VERSION="+v, "--label",
			"version="+v); err != nil {
			return err
		}
	}
	for _, v := range appVersions {
		app, err := m.compile(ctx, "app", v)
		if err != nil {
			return err
		}
		if err := m.image(ctx, "busybox:1.0", "app:"+v, []tarEntry{{name: "app", data: app, mode: 0o755}},
			"--entrypoint", "/app", "--cmd", "", "--env", "VERSION="+v, "--label", "version="+v); err != nil {
			return err
		}
	}
	// Names without a registry, as users type them.
	for name, version := range map[string]string{"app": "1", "busybox": "1.0", "nginx": "1"} {
		source, versions := "app", appVersions[:]
		if name == "busybox" {
			source, versions = name, busyboxVersions[:]
		}
		tags := map[string]string{"latest": version}
		for _, v := range versions {
			tags[v] = v
		}
		for tag, v := range tags {
			if err := crane(ctx, m.bin, "copy", "--insecure", m.registry+"/"+source+":"+v,
				m.registry+"/library/"+name+":"+tag); err != nil {
				return err
			}
		}
	}
	return nil
}

func (m *imageMaker) compile(ctx context.Context, name, version string) ([]byte, error) {
	out := filepath.Join(m.work, name)
	msg, err := goCommand(ctx, m.source, []string{"CGO_ENABLED=0"}, "build", "-buildvcs=false",
		"-ldflags", "-s -w -X main.version="+version, "-o", out, "./test/images/"+name)
	if err != nil {
		return nil, fmt.Errorf("build %s: %w\n%s", name, err, msg)
	}
	return os.ReadFile(out)
}

// image pushes name, one layer on top of base (nothing when empty), with its config changed by
// crane's mutate flags.
func (m *imageMaker) image(ctx context.Context, base, name string, layer []tarEntry, mutate ...string) error {
	file := filepath.Join(m.work, "layer.tar")
	if err := writeTar(file, layer); err != nil {
		return err
	}
	return pushImage(ctx, m.bin, m.registry, base, name, []string{file}, mutate...)
}

func pushImage(ctx context.Context, bin, registry, base, name string, layers []string, mutate ...string) error {
	ref := registry + "/" + name
	args := []string{"append", "--insecure", "-t", ref}
	for _, l := range layers {
		args = append(args, "-f", l)
	}
	if base != "" {
		args = append(args, "-b", registry+"/"+base)
	}
	if err := crane(ctx, bin, args...); err != nil {
		return err
	}
	return crane(ctx, bin,
		append(append([]string{"mutate", "--insecure", "--set-platform", "linux/amd64", "-t", ref}, mutate...), ref)...)
}

func crane(ctx context.Context, bin string, args ...string) error {
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "crane"), args...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("crane %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

// tarEntry is a file, a directory (name ends in /) or, when link is set, a symlink.
type tarEntry struct {
	name, link string
	data       []byte
	mode       int64
}

// writeTar writes entries with a fixed time, so that equal content gives equal digests.
func writeTar(path string, entries []tarEntry) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := tar.NewWriter(f)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Mode: e.mode, Size: int64(len(e.data)), ModTime: time.Unix(0, 0),
			Typeflag: tar.TypeReg}
		switch {
		case e.link != "":
			h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, e.link, 0o777
		case strings.HasSuffix(e.name, "/"):
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		if _, err := w.Write(e.data); err != nil {
			return err
		}
	}
	return w.Close()
}
