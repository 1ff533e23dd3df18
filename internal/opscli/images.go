// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package opscli

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/distribution/reference"
	"google.golang.org/protobuf/proto"
	"k8s.io/apimachinery/pkg/util/duration"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// Pulls writes a row for each pull.
func (p *Printer) Pulls(l *opsv1.ListPullsResponse) error { return p.pulls(l, l.GetPulls()) }

// Pull writes one pull.
func (p *Printer) Pull(op *opsv1.PullOperation) error { return p.pulls(op, []*opsv1.PullOperation{op}) }

// pulls writes a row for each pull, or m as a document.
func (p *Printer) pulls(m proto.Message, pulls []*opsv1.PullOperation) error {
	if p.Format.structured() {
		return p.message(m)
	}
	if len(pulls) == 0 {
		return p.words("No pulls.")
	}
	columns := []string{"PULL", "IMAGE", "PHASE", "REASON", "DONE", "SIZE", "RATE", "AGE"}
	if p.Format == Wide {
		columns = append(columns, "ATTEMPT", "OWNER")
	}
	single := len(pulls) == 1
	if p.Format == Wide || single {
		columns = append(columns, "MESSAGE")
	}
	t := newTable(p.Out, columns...)
	for _, op := range pulls {
		done, size, rate := "", "", ""
		if op.GetBytesTotal() > 0 {
			done, size = fmt.Sprintf("%d%%", 100*op.GetBytesDone()/op.GetBytesTotal()), bytesText(op.GetBytesTotal())
		}
		if op.GetBytesPerSecond() > 0 {
			rate = bytesText(op.GetBytesPerSecond()) + "/s"
		}
		row := []string{
			op.GetUid(), op.GetImage(), pullPhase(op), op.GetReason(), done, size, rate, p.age(op.GetCreateTime()),
		}
		if p.Format == Wide {
			row = append(row, fmt.Sprint(op.GetAttempt()), op.GetOwner())
		}
		if p.Format == Wide || single {
			row = append(row, op.GetMessage())
		}
		t.row(row...)
	}
	return t.flush()
}

// DescribePull returns image and phase of a pull, for completion.
func DescribePull(op *opsv1.PullOperation) string { return op.GetImage() + " " + pullPhase(op) }

// PinnedImages asks for pins and pulls, and writes a row for each pin, then for each image that
// was pulled without a pin.
func (p *Printer) PinnedImages(ctx context.Context, client opsv1.ImagesClient) error {
	pins, err := client.ListPins(ctx, &opsv1.ListPinsRequest{})
	if err != nil {
		return err
	}
	if p.Format.structured() {
		return p.message(pins)
	}
	pulls, err := client.ListPulls(ctx, &opsv1.ListPullsRequest{})
	if err != nil {
		return err
	}
	return p.images(pins, pulls.GetPulls())
}

func (p *Printer) images(pinned *opsv1.ListPinsResponse, pulls []*opsv1.PullOperation) error {
	type key struct{ image, owner string }
	shown := map[key]bool{}
	var rows [][]string
	const gone = "<gone>"
	for _, pin := range pinned.GetPins() {
		shown[key{pin.GetImage(), pin.GetOwner()}] = true
		until := p.until(pin.GetExpireTime().AsTime())
		if pin.GetGone() {
			until = gone
		}
		rows = append(rows, []string{
			pin.GetImage(), imageID(pin.GetImageId()), bytesText(pin.GetSizeBytes()), until, pin.GetOwner(),
		})
	}
	for _, op := range pulls {
		k := key{op.GetResolved(), op.GetOwner()}
		if op.GetPhase() != opsv1.PullPhase_PULL_SUCCEEDED || shown[k] {
			continue
		}
		shown[k] = true
		size, until := "", "<not pinned>"
		if op.GetBytesTotal() > 0 {
			size = bytesText(op.GetBytesTotal())
		}
		if slices.Contains(pinned.GetGoneImageIds(), op.GetImageId()) {
			until = gone
		}
		rows = append(rows, []string{op.GetResolved(), imageID(op.GetImageId()), size, until, op.GetOwner()})
	}
	if len(rows) == 0 {
		return p.words("No images.")
	}
	t := newTable(p.Out, "IMAGE", "IMAGE ID", "SIZE", "PINNED FOR", "OWNER")
	for _, r := range rows {
		t.row(r...)
	}
	return t.flush()
}

func (p *Printer) until(t time.Time) string {
	left := t.Sub(p.Now())
	if left <= 0 {
		return "<ending>"
	}
	return duration.HumanDuration(left)
}

func imageID(id string) string {
	return fmt.Sprintf("%.12s", strings.TrimPrefix(id, "sha256:"))
}

// Unpin removes the pins of an owner, or all pins of an image, and says how many.
func (p *Printer) Unpin(ctx context.Context, client opsv1.ImagesClient, ownerOrImage string) error {
	l, err := client.ListPins(ctx, &opsv1.ListPinsRequest{})
	if err != nil {
		return err
	}
	requests, err := releases(l.GetPins(), ownerOrImage)
	if err != nil {
		return err
	}
	total := &opsv1.ReleasePinsResponse{}
	for _, r := range requests {
		done, err := client.ReleasePins(ctx, r)
		if err != nil {
			return err
		}
		total.Released += done.GetReleased()
	}
	if p.Format.structured() {
		return p.message(total)
	}
	return p.words("%d pins ended.", total.GetReleased())
}

// releases are the commands that end the pins of an owner or of an image.
func releases(pins []*opsv1.ImagePin, what string) ([]*opsv1.ReleasePinsRequest, error) {
	if slices.ContainsFunc(pins, func(p *opsv1.ImagePin) bool { return p.GetOwner() == what }) {
		return []*opsv1.ReleasePinsRequest{{Owner: what}}, nil
	}
	full := what
	if named, err := reference.ParseDockerRef(what); err == nil {
		full = named.String()
	}
	var out []*opsv1.ReleasePinsRequest
	for _, p := range pins {
		id := strings.TrimPrefix(p.GetImageId(), "sha256:")
		byID := len(what) >= digestWidth && strings.HasPrefix(id, strings.TrimPrefix(what, "sha256:"))
		if p.GetImage() == full || byID {
			out = append(out, &opsv1.ReleasePinsRequest{Owner: p.GetOwner(), ImageId: p.GetImageId()})
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("nothing is pinned by or as %q; see cri-proxy ctl images", what)
	}
	return out, nil
}
