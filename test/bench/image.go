// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// largeImage is the app with layers of random bytes.
type largeImage struct {
	ref    string
	layers []ocispec.Descriptor // the large ones
}

// pushLarge makes the image bench:TAG in the bed's registry.
func pushLarge(ctx context.Context, bed *testbed.Bed, tag string, layers, mib int) (*largeImage, error) {
	fmt.Fprintf(os.Stderr, "make an image of %d layers of %d MiB ...\n", layers, mib)
	if err := bed.PushLargeImage(ctx, "bench:"+tag, layers, mib); err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+bed.Registry+"/v2/bench/manifests/"+tag, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept",
		strings.Join([]string{ocispec.MediaTypeImageManifest, "application/vnd.docker.distribution.manifest.v2+json"},
			", "))
	resp, err := (&http.Client{Timeout: timeout}).Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil || len(m.Layers) == 0 {
		return nil, fmt.Errorf("manifest of the image: %s: %w", resp.Status, errors.Join(err, errors.New("no layers")))
	}
	// The app's own layers may stay in the runtime, which has other images with them.
	m.Layers = slices.DeleteFunc(m.Layers, func(d ocispec.Descriptor) bool { return d.Size < int64(mib)<<19 })
	return &largeImage{ref: bed.Image("bench:" + tag), layers: m.Layers}, nil
}

// mib is the size as the registry has it.
func (i *largeImage) mib() (sum float64) {
	for _, l := range i.layers {
		sum += float64(l.Size) / (1 << 20)
	}
	return sum
}

// remove removes the image from a node and waits until its layers have been collected.
func (i *largeImage) remove(ctx context.Context, runtime grpc.ClientConnInterface) error {
	if _, err := runtimeapi.NewImageServiceClient(runtime).
		RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: i.ref}}); err != nil {
		return err
	}
	content := contentapi.NewContentClient(runtime)
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(ctx, "k8s.io"), timeout)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for _, l := range i.layers {
		for {
			_, err := content.Info(ctx, &contentapi.InfoRequest{Digest: l.Digest.String()})
			if status.Code(err) == codes.NotFound {
				break
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return fmt.Errorf("layer %s stays: %w", l.Digest, err)
			}
		}
	}
	return nil
}
