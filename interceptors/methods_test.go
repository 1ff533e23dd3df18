// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors"
	"github.com/cri-proxy/cri-proxy/proxy"
)

var update = flag.Bool("update", false, "write the golden files")

const methodsGolden = "testdata/methods.txt"

// methodStates are the states of a view, and of what is beside it, in which a director may answer
// differently for the same method.
var methodStates = []struct {
	name   string
	images unclaimed
	enter  func(b *bed)
}{
	{name: "idle", enter: func(*bed) {}},
	{name: "unjudged", enter: func(b *bed) { b.view.Guard() }},
	{name: "guarded", enter: func(b *bed) { b.view.Guard(); b.view.Judged() }},
	{name: "hiding", enter: func(b *bed) { b.swapping() }},
	{name: "revealed", enter: func(b *bed) { b.swapping().Reveal() }},
	{name: "starts", enter: func(b *bed) { b.view.SetStarted(web, time.Unix(1, 0)) }},
	{name: "images", images: unclaimed{"sha256:1": true}, enter: func(*bed) {}},
}

// methodsBed is a bed whose director has all that is optional, or nothing of it.
func methodsBed(t *testing.T, bare bool, images unclaimed, judge interceptors.Judge) *bed {
	b := newBed(t)
	log := logrus.New()
	log.SetOutput(io.Discard)
	o := interceptors.Options{View: b.view, Records: b.records, Log: log}
	if !bare {
		o.Pulls, o.Images, o.Judge = images, images, judge
	}
	b.director = interceptors.New(o)
	return b
}

// methodNames are all methods of the CRI, and some that are not of it.
func methodNames() []string {
	all := append(unaryMethods(), streamMethods()...)
	for _, m := range runtimeapi.ImageService_ServiceDesc.Streams {
		all = append(all, "/runtime.v1.ImageService/"+m.StreamName)
	}
	return append(all, "/runtime.v1.RuntimeService/ListContainers2", "/other.Service/ListContainers", "")
}

// answers is what the director says of a method in a state: Unary, Stream and Pass, one letter
// each.
func (b *bed) answers(method string) string {
	out := []byte("--.")
	if b.director.Unary(method) != nil {
		out[0] = 'U'
	}
	if b.director.Stream(method) != nil {
		out[1] = 'S'
	}
	switch done, ok := b.director.Pass(method); {
	case !ok:
		out[2] = 'r' // Unary is to be asked again
	case done != nil:
		out[2] = 'c' // counted until it is answered
		done()
	}
	return string(out)
}

// waitsForJudge reports whether a call that is taken waits for the judge.
func waitsForJudge(t *testing.T, method string) string {
	judge := status.Error(codes.DataLoss, "the judge")
	b := methodsBed(t, false, unclaimed{"sha256:1": true}, judgeFunc(func(context.Context) error { return judge }))
	b.view.Guard()
	next := func(context.Context, []byte) ([]byte, error) { return nil, nil }
	var err error
	if take := b.director.Unary(method); take != nil {
		_, err = take(t.Context(), method, nil, next)
	} else if take := b.director.Stream(method); take != nil {
		var filter proxy.StreamFilter
		if _, filter, err = take(t.Context(), method, nil); err == nil {
			filter.Close()
		}
	}
	if errors.Is(err, judge) {
		return "judge"
	}
	return "-"
}

// inAnotherVersion says how a call of the method's name in another version of the CRI is treated:
// whether it waits while a container is hidden, and whether hiding one waits for it.
func inAnotherVersion(t *testing.T, method string) string {
	b := newBed(t)
	name := "/runtime.v2.RuntimeService/" + method[strings.LastIndexByte(method, '/')+1:]
	done, ok := b.director.PassUnknown(t.Context(), name, func() {})
	switch {
	case !ok:
		t.Errorf("%s: refused", name)
		return "refused"
	case done == nil:
		return "-"
	}
	defer done()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	c := b.claimed()
	defer c.Release()
	if err := c.Hide(ctx, token); err != nil {
		return "waits,blocks"
	}
	return "waits"
}

// What the director answers for each CRI method in each state is one table.
func TestMethods(t *testing.T) {
	var out bytes.Buffer
	w := tabwriter.NewWriter(&out, 0, 0, 1, ' ', 0)
	fmt.Fprint(w, "method\tdepends\tjudged\tnewer\tbare")
	for _, s := range methodStates {
		fmt.Fprint(w, "\t", s.name)
	}
	fmt.Fprintln(w)
	beds := make([]*bed, len(methodStates))
	for i, s := range methodStates {
		beds[i] = methodsBed(t, false, s.images, nil)
		s.enter(beds[i])
	}
	bare := methodsBed(t, true, nil, nil)
	for _, method := range methodNames() {
		short := method[strings.LastIndexByte(method, '/')+1:]
		if !strings.HasPrefix(method, "/runtime.v1.") {
			short = fmt.Sprintf("%q", method)
		}
		depends := map[proxy.Dependency]string{
			proxy.Independent: "never", proxy.UntilForwarded: "forwarded", proxy.UntilAnswered: "answered",
		}
		if got := bare.director.Dependency(method); got != beds[0].director.Dependency(method) {
			short += "(bare:" + depends[got] + ")"
		}
		fmt.Fprint(w, short, "\t", depends[beds[0].director.Dependency(method)], "\t", waitsForJudge(t, method), "\t",
			inAnotherVersion(t, method), "\t", bare.answers(method))
		for _, b := range beds {
			fmt.Fprint(w, "\t", b.answers(method))
		}
		fmt.Fprintln(w)
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile(methodsGolden, out.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(methodsGolden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out.Bytes(), want) {
		t.Errorf("got:\n%s\nwant (%s):\n%s", out.Bytes(), methodsGolden, want)
	}
}
