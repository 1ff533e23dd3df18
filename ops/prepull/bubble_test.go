// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/prepull"
	"github.com/cri-proxy/cri-proxy/ops/prepull/imagestore"
)

// bubble is a puller where time passes only when nothing else can happen: no sockets, so the
// runtime is called directly. That runtime is not containerd: it has CRI and nothing else, but for
// containerd's images if a test gives it some, and its content store, see [contents].
type bubble struct {
	*prepull.Puller
	t    *testing.T
	rt   *fakeRuntime
	dir  string
	opts prepull.Options
	over func()
	// opened, if not nil, is called with a puller before it runs.
	opened func(p *prepull.Puller)
}

func inBubble(t *testing.T, o prepull.Options, f func(t *testing.T, b *bubble)) {
	t.Helper()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		log := logrus.New()
		log.SetOutput(io.Discard)
		b := &bubble{t: t, rt: &fakeRuntime{images: map[string]bool{}}, dir: dir, opts: o}
		b.opts.StateDir, b.opts.Conn, b.opts.Log = dir, b.rt, log
		b.open()
		synctest.Wait() // what a puller begins with is over, and a test may set up its runtime
		f(t, b)
		b.over()
	})
}

// open starts the puller, again after over.
func (b *bubble) open() {
	b.t.Helper()
	var err error
	if b.Puller, err = prepull.Open(b.opts); err != nil {
		b.t.Fatal(err)
	}
	if b.opened != nil {
		b.opened(b.Puller)
	}
	if err := b.NoSync(); err != nil {
		b.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- b.Run(ctx) }()
	p := b.Puller
	b.over = sync.OnceFunc(func() {
		cancel()
		if err := errors.Join(<-ran, p.Close()); err != nil {
			b.t.Error(err)
		}
	})
}

func (b *bubble) restart() {
	b.over()
	b.open()
}

func (b *bubble) pull(req *opsv1.PullRequest) {
	b.t.Helper()
	if _, err := prepull.NewServer(b.Puller).Pull(b.t.Context(), req); err != nil {
		b.t.Fatal(err)
	}
	synctest.Wait()
}

// hurry has something wait for a pull.
func (b *bubble) hurry(uid string) {
	b.Hurry(uid)
}

func (b *bubble) get(uid string) *opsv1.PullOperation {
	b.t.Helper()
	op, _, err := b.Watch(uid)
	if err != nil {
		b.t.Fatal(err)
	}
	return op
}

// want checks where a pull is once nothing more happens without time passing.
func (b *bubble) want(uid string, phase opsv1.PullPhase, reason string) *opsv1.PullOperation {
	b.t.Helper()
	synctest.Wait()
	op := b.get(uid)
	if op.GetPhase() != phase || op.GetReason() != reason {
		b.t.Errorf("%s: want %s %s: %v", uid, phase, reason, op)
	}
	return op
}

// end lets time pass until the pull has ended.
func (b *bubble) end(uid string) *opsv1.PullOperation {
	b.t.Helper()
	for {
		op, changed, err := b.Watch(uid)
		if err != nil || op.GetFinishTime() != nil {
			return op
		}
		select {
		case <-changed:
		case <-time.After(48 * time.Hour):
			b.t.Fatalf("%s does not end: %v", uid, op)
		}
	}
}

// fakeRuntime is the image service of a runtime.
type fakeRuntime struct {
	mu      sync.Mutex // guards all following fields
	images  map[string]bool
	labels  map[string]map[string]string // of containerd's images; nil without containerd
	takes   time.Duration                // a pull
	fail    []error                      // of the next pulls, nil is none; the last one stays
	late    error                        // of the pulls that begin, after the time that they take; nil is none
	bug     bool                         // pulls panic
	pulls   []*runtimeapi.PullImageRequest
	pulling func(ctx context.Context, req *runtimeapi.PullImageRequest) error // what a pull does at first; nil: nothing
	answer  func(args any) proto.Message                                      // to other calls; nil: none
	// where the images are; empty: it does not tell
	disk    string
	size    uint64 // of each image
	arch    string // the same; empty: it does not tell
	running int
	most    int // that ran at once
	content *contents
}

var _ grpc.ClientConnInterface = (*fakeRuntime)(nil)

// Invoke implements [grpc.ClientConnInterface].
func (r *fakeRuntime) Invoke(ctx context.Context, method string, args, reply any, _ ...grpc.CallOption) error {
	switch req := args.(type) {
	case *runtimeapi.ImageStatusRequest:
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.images[strings.TrimPrefix(req.GetImage().GetImage(), "sha256:")] {
			resp := &runtimeapi.ImageStatusResponse{Image: r.image(req.GetImage().GetImage())}
			if req.GetVerbose() && r.arch != "" {
				resp.Info = map[string]string{"info": `{"imageSpec":{"os":"` + runtime.GOOS + `","architecture":"` +
					r.arch + `"}}`}
			}
			proto.Merge(reply.(proto.Message), resp)
		}
		return nil
	case *runtimeapi.ImageFsInfoRequest:
		if r.disk == "" {
			return status.Error(codes.Unimplemented, method)
		}
		proto.Merge(reply.(proto.Message),
			&runtimeapi.ImageFsInfoResponse{ImageFilesystems: []*runtimeapi.FilesystemUsage{
				{FsId: &runtimeapi.FilesystemIdentifier{Mountpoint: r.disk}},
			}})
		return nil
	case *runtimeapi.ListImagesRequest:
		r.mu.Lock()
		defer r.mu.Unlock()
		list := &runtimeapi.ListImagesResponse{}
		for name := range r.images {
			list.Images = append(list.Images, imageCalled(name))
		}
		proto.Merge(reply.(proto.Message), list)
		return nil
	case *runtimeapi.PullImageRequest:
		return r.pull(ctx, req)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.content != nil {
		if known, err := r.content.answer(args, reply); known {
			return err
		}
	}
	if r.answer != nil {
		if m := r.answer(args); m != nil {
			proto.Merge(reply.(proto.Message), m)
			return nil
		}
	}
	if r.labels == nil {
		return status.Error(codes.Unimplemented, method)
	}
	switch req := args.(type) {
	case *imagesapi.GetImageRequest:
		labels, ok := r.labels[req.GetName()]
		if !ok {
			return status.Error(codes.NotFound, "no such image")
		}
		proto.Merge(reply.(proto.Message), &imagesapi.GetImageResponse{Image: &imagesapi.Image{Name: req.GetName(),
			Labels: labels}})
		return nil
	case *imagesapi.ListImagesRequest: // of those that we have pinned
		list := &imagesapi.ListImagesResponse{}
		for name, labels := range r.labels {
			if labels[imagestore.PinnedByUs] != "" {
				list.Images = append(list.Images, &imagesapi.Image{Name: name, Labels: labels})
			}
		}
		proto.Merge(reply.(proto.Message), list)
		return nil
	case *imagesapi.UpdateImageRequest:
		r.labels[req.GetImage().GetName()] = maps.Clone(req.GetImage().GetLabels())
		return nil
	}
	return status.Error(codes.Unimplemented, method)
}

func (r *fakeRuntime) image(name string) *runtimeapi.Image {
	image := imageCalled(name)
	image.Size = r.size
	return image
}

// imageCalled is the image of that name, or ID.
func imageCalled(name string) *runtimeapi.Image {
	name = strings.TrimPrefix(name, "sha256:")
	return &runtimeapi.Image{Id: "sha256:" + name, RepoTags: []string{name}}
}

// NewStream implements [grpc.ClientConnInterface].
func (r *fakeRuntime) NewStream(
	_ context.Context, _ *grpc.StreamDesc, method string, _ ...grpc.CallOption,
) (grpc.ClientStream, error) {
	if r.content != nil && strings.HasSuffix(method, "Content/Read") {
		return &blobStream{c: r.content}, nil
	}
	return nil, status.Error(codes.Unimplemented, method)
}

func (r *fakeRuntime) pull(ctx context.Context, req *runtimeapi.PullImageRequest) error {
	r.mu.Lock()
	takes, late := r.takes, r.late
	var fail error
	if len(r.fail) > 0 {
		if fail = r.fail[0]; len(r.fail) > 1 {
			r.fail = r.fail[1:]
		}
	}
	r.pulls = append(r.pulls, req)
	if r.bug {
		r.mu.Unlock()
		panic("a bug")
	}
	r.running++
	r.most = max(r.most, r.running)
	pulling := r.pulling
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		r.running--
		r.mu.Unlock()
	}()
	if pulling != nil {
		if err := pulling(ctx, req); err != nil {
			return err
		}
	}
	if fail != nil {
		return fail
	}
	if r.content != nil {
		if err := r.fetch(ctx, req, takes); err != nil {
			return err
		}
		takes = 0
	}
	select {
	case <-time.After(takes):
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
	if late != nil {
		return late
	}
	r.mu.Lock()
	r.images[req.GetImage().GetImage()] = true
	r.mu.Unlock()
	return nil
}

func (r *fakeRuntime) set(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
}

func (r *fakeRuntime) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.pulls)
}

func credentials(matches ...string) []*opsv1.RegistryCredential {
	var out []*opsv1.RegistryCredential
	for _, m := range matches {
		out = append(out, &opsv1.RegistryCredential{Match: m, Username: m})
	}
	return out
}

// asked begins what the runtime says of a registry's answer.
const asked = "unexpected status from HEAD request to https://r.io/v2/a/manifests/1: "

func unauthorized() error {
	return status.Error(codes.Unknown, asked+"401 Unauthorized")
}

func broken() error {
	return status.Error(codes.Unknown, asked+"500 Internal Server Error")
}

func name(i int) string { return fmt.Sprintf("image-%d", i) }
