// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"archive/tar"
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// pushed is an image that no other test has a layer of.
type pushed struct {
	name   string // such as t1:1
	digest digest.Digest
	size   int64 // of the layers
}

// push makes an image of so many layers of random bytes and pushes it to the bed's registry. The
// layers are not compressed, so it takes a fraction of what [testbed.Bed.PushLargeImage] does.
func push(t testing.TB, name string, layers, mib int) pushed {
	t.Helper()
	repository, tag, _ := bytes.Cut([]byte(name), []byte(":"))
	p := pushed{name: name}
	config := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"},
		RootFS: ocispec.RootFS{Type: "layers"}}
	manifest := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest}
	for i := range layers {
		data := make([]byte, mib<<20)
		_, _ = rand.Read(data) // never fails
		var b bytes.Buffer
		b.Grow(len(data) + 4<<10)
		w := tar.NewWriter(&b)
		must(t, w.WriteHeader(&tar.Header{Name: fmt.Sprintf("filler-%d", i), Mode: 0o644, Size: int64(len(data)),
			Typeflag: tar.TypeReg}))
		_, err := w.Write(data)
		must(t, err)
		must(t, w.Close())
		d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(b.Bytes()),
			Size: int64(b.Len())}
		putBlob(t, string(repository), d.Digest, b.Bytes())
		manifest.Layers = append(manifest.Layers, d)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, d.Digest)
		p.size += d.Size
	}
	raw, err := json.Marshal(config)
	must(t, err)
	manifest.Config = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(raw),
		Size: int64(len(raw))}
	putBlob(t, string(repository), manifest.Config.Digest, raw)
	raw, err = json.Marshal(manifest)
	must(t, err)
	p.digest = digest.FromBytes(raw)
	send(t, http.MethodPut, fmt.Sprintf("http://%s/v2/%s/manifests/%s", bed.Registry, repository, tag),
		manifest.MediaType, raw)
	return p
}

func putBlob(t testing.TB, repository string, d digest.Digest, data []byte) {
	t.Helper()
	resp := send(t, http.MethodPost, fmt.Sprintf("http://%s/v2/%s/blobs/uploads/", bed.Registry, repository), "", nil)
	at, err := resp.Location()
	must(t, err)
	q := at.Query()
	q.Set("digest", d.String())
	at.RawQuery = q.Encode()
	send(t, http.MethodPut, at.String(), "application/octet-stream", data)
}

func send(t testing.TB, method, url, mediaType string, body []byte) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, bytes.NewReader(body))
	must(t, err)
	if mediaType != "" {
		req.Header.Set("Content-Type", mediaType)
	}
	resp, err := http.DefaultClient.Do(req)
	must(t, err)
	defer resp.Body.Close()
	answer, _ := io.ReadAll(resp.Body)
	if resp.StatusCode/100 != 2 {
		t.Fatalf("%s %s: %s\n%s", method, url, resp.Status, answer)
	}
	return resp
}
