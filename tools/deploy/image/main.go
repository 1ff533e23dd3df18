// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/google/ko/pkg/build"
)

// user is the one that distroless images call nonroot; deploy/controller asks for the same.
const user = "65532:65532"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("image", flag.ContinueOnError)
	platforms := flags.String("platforms", "linux/amd64,linux/arm64", "comma-separated list of os/architecture")
	to := flags.String("to", "",
		"where to: a reference is pushed, a name that ends in .tar is written as an OCI archive")
	insecure := flags.Bool("insecure", false, "the registry speaks plain HTTP")
	vcs := flags.String("buildvcs", "auto", "go build's flag of this name: whether the binary knows its commit")
	dir := flags.String("dir", ".", "root of the module")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 1 || *to == "" {
		return errors.New("give -to and one package, e.g. -to registry.example/cri-controller:v1 ./cmd/cri-controller")
	}
	index, err := image(ctx, *dir, flags.Arg(0), *vcs, strings.Split(*platforms, ","))
	if err != nil {
		return err
	}
	digest, err := index.Digest()
	if err != nil {
		return err
	}
	if strings.HasSuffix(*to, ".tar") {
		if err := archive(index, filepath.Base(flags.Arg(0)), *to); err != nil {
			return err
		}
		_, err = fmt.Fprintf(stdout, "%s %s\n", *to, digest)
		return err
	}
	var options []name.Option
	if *insecure {
		options = append(options, name.Insecure)
	}
	ref, err := name.ParseReference(*to, options...)
	if err != nil {
		return fmt.Errorf("%q is no image reference: %w", *to, err)
	}
	if err := remote.WriteIndex(ref, index, remote.WithContext(ctx),
		remote.WithAuthFromKeychain(authn.DefaultKeychain)); err != nil {
		return fmt.Errorf("push %s: %w", ref, err)
	}
	_, err = fmt.Fprintf(stdout, "%s@%s\n", ref.Context(), digest)
	return err
}

// image builds one image per platform, joined in an index.
func image(ctx context.Context, dir, program, vcs string, platforms []string) (v1.ImageIndex, error) {
	created, err := creationTime()
	if err != nil {
		return nil, err
	}
	base, err := scratch(platforms)
	if err != nil {
		return nil, err
	}
	ref, err := name.ParseReference("scratch")
	if err != nil {
		return nil, err
	}
	builder, err := build.NewGo(ctx, dir,
		build.WithBaseImages(func(context.Context, string) (name.Reference, build.Result, error) {
			return ref,
				base, nil
		}),
		build.WithPlatforms(platforms...), build.WithTrimpath(true), build.WithDefaultLdflags([]string{"-s", "-w"}),
		build.WithDefaultFlags([]string{"-buildvcs=" + vcs}),
		build.WithCreationTime(created), build.WithKoDataCreationTime(created),
		build.WithUser(user), build.WithDisabledSBOM(), build.WithJobs(1),
		build.WithLabel("org.opencontainers.image.source", "https://github.com/cri-proxy/cri-proxy"),
		build.WithLabel("org.opencontainers.image.licenses", "Apache-2.0"),
	)
	if err != nil {
		return nil, err
	}
	path, err := builder.QualifyImport(program)
	if err != nil {
		return nil, err
	}
	result, err := builder.Build(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("build %s: %w", path, err)
	}
	switch r := result.(type) {
	case v1.ImageIndex:
		return r, nil
	case v1.Image: // ko's answer to one platform
		platform, err := v1.ParsePlatform(platforms[0])
		if err != nil {
			return nil, err
		}
		return mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex),
			mutate.IndexAddendum{Add: r, Descriptor: v1.Descriptor{Platform: platform}}), nil
	}
	return nil, fmt.Errorf("build %s: neither an image nor an index but %T", path, result)
}

// scratch is a base of nothing for each platform.
func scratch(platforms []string) (v1.ImageIndex, error) {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, p := range platforms {
		platform, err := v1.ParsePlatform(p)
		if err != nil {
			return nil, err
		}
		config, err := empty.Image.ConfigFile()
		if err != nil {
			return nil, err
		}
		config = config.DeepCopy()
		config.OS, config.Architecture, config.Variant = platform.OS, platform.Architecture, platform.Variant
		oci := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
		one, err := mutate.ConfigFile(oci, config)
		if err != nil {
			return nil, err
		}
		index = mutate.AppendManifests(index,
			mutate.IndexAddendum{Add: one, Descriptor: v1.Descriptor{Platform: platform}})
	}
	return index, nil
}

// creationTime is $SOURCE_DATE_EPOCH, else 1970: a clock would make every build another one.
func creationTime() (v1.Time, error) {
	seconds := int64(0)
	if s := os.Getenv("SOURCE_DATE_EPOCH"); s != "" {
		var err error
		if seconds, err = strconv.ParseInt(s, 10, 64); err != nil {
			return v1.Time{}, fmt.Errorf("SOURCE_DATE_EPOCH must be seconds since 1970: %w", err)
		}
	}
	return v1.Time{Time: time.Unix(seconds, 0).UTC()}, nil
}

// archive writes an OCI image layout as a tar file, which ctr, podman and docker load. The image is
// called program:latest.
func archive(index v1.ImageIndex, program, file string) (err error) {
	dir, err := os.MkdirTemp(filepath.Dir(file), ".image-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	if err := path.AppendIndex(index, layout.WithAnnotations(map[string]string{
		"org.opencontainers.image.ref.name": "latest",
		// What deploy/controller calls it: `ctr -n k8s.io images import` is then enough.
		"io.containerd.image.name": "docker.io/library/" + program + ":latest",
	})); err != nil {
		return err
	}
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	w := tar.NewWriter(f)
	defer func() { err = errors.Join(err, w.Close(), f.Close()) }()
	return fs.WalkDir(os.DirFS(dir), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data)),
			Typeflag: tar.TypeReg}); err != nil {
			return err
		}
		_, err = w.Write(data)
		return err
	})
}
