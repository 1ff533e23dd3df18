// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
	"k8s.io/apimachinery/pkg/util/duration"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

func (c *ctl) pulls() *cobra.Command {
	var active bool
	var cancelIt bool
	cmd := &cobra.Command{
		Use:   "pulls [UID]",
		Short: "Show pulls of images ahead of time, newest first, or one of them",
		Args:  cobra.MaximumNArgs(1),
		ValidArgsFunction: c.completeImages(func(ctx context.Context, client opsv1.ImagesClient) ([]cobra.Completion, error) {
			l, err := client.ListPulls(ctx, &opsv1.ListPullsRequest{ActiveOnly: active || cancelIt})
			var found []cobra.Completion
			for _, op := range l.GetPulls() {
				found = append(found, cobra.CompletionWithDesc(op.GetUid(), op.GetImage()+" "+pullPhase(op)))
			}
			return found, err
		}),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case len(args) == 1 && active:
				return usage("--active is for the list of pulls, leave the UID out")
			case len(args) == 0 && cancelIt:
				return usage("which pull is to be cancelled? give its UID")
			}
			return c.call(cmd, func(ctx context.Context, client opsv1.ImagesClient) error {
				if len(args) == 0 {
					l, err := client.ListPulls(ctx, &opsv1.ListPullsRequest{ActiveOnly: active})
					if err != nil {
						return err
					}
					return c.printPulls(cmd.OutOrStdout(), l, l.GetPulls())
				}
				op, err := client.GetPull(ctx, &opsv1.GetPullRequest{Uid: args[0]})
				if err == nil && cancelIt {
					op, err = client.CancelPull(ctx, &opsv1.CancelPullRequest{Uid: args[0], Reason: "cancelled by " + requester()})
				}
				if err != nil {
					return err
				}
				return c.printPulls(cmd.OutOrStdout(), op, []*opsv1.PullOperation{op})
			})
		},
	}
	cmd.Flags().BoolVar(&active, "active", false, "leave finished pulls out")
	cmd.Flags().BoolVar(&cancelIt, "cancel", false, "cancel the pull; what it has fetched is kept for an hour")
	return cmd
}

func (c *ctl) images() *cobra.Command {
	return &cobra.Command{
		Use:   "images",
		Short: "Show the images that were pulled ahead of time, until when they are pinned and for whom",
		Long: `Show the images that are pinned: kept from kubelet's image garbage collection until a
time, on behalf of an owner. Those that have been pulled in the last hour without
being pinned are shown too. <gone> is an image that somebody has removed from the
node since: it is pinned again if it comes back before its pin's end.`,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.call(cmd, func(ctx context.Context, client opsv1.ImagesClient) error {
				pins, err := client.ListPins(ctx, &opsv1.ListPinsRequest{})
				if err != nil {
					return err
				}
				if c.output.structured() {
					return c.print(cmd.OutOrStdout(), pins)
				}
				pulls, err := client.ListPulls(ctx, &opsv1.ListPullsRequest{})
				if err != nil {
					return err
				}
				return c.printImages(cmd.OutOrStdout(), pins, pulls.GetPulls())
			})
		},
	}
}

func (c *ctl) unpin() *cobra.Command {
	return &cobra.Command{
		Use:   "unpin OWNER|IMAGE",
		Short: "End the pins of an owner, or of an image for all owners",
		Long: `End the pins of an owner, or those of an image for all its owners. The image
stays; kubelet may remove it when the disk is full.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 || args[0] == "" {
				return usage("name an owner or an image, as cri-proxy ctl images shows them")
			}
			return nil
		},
		ValidArgsFunction: c.completeImages(func(ctx context.Context, client opsv1.ImagesClient) ([]cobra.Completion, error) {
			l, err := client.ListPins(ctx, &opsv1.ListPinsRequest{})
			var found []cobra.Completion
			for _, p := range l.GetPins() {
				found = append(found, cobra.CompletionWithDesc(p.GetOwner(), "owner"), cobra.CompletionWithDesc(p.GetImage(), "image"))
			}
			slices.Sort(found)
			return slices.Compact(found), err
		}),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd, func(ctx context.Context, client opsv1.ImagesClient) error {
				l, err := client.ListPins(ctx, &opsv1.ListPinsRequest{})
				if err != nil {
					return err
				}
				requests, err := releases(l.GetPins(), args[0])
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
				if c.output.structured() {
					return c.print(cmd.OutOrStdout(), total)
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "%d pins ended.\n", total.GetReleased())
				return err
			})
		},
	}
}

// releases are the commands that end the pins of an owner or an image.
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

// call runs f with a client and a time limit.
func (c *ctl) call(cmd *cobra.Command, f func(context.Context, opsv1.ImagesClient) error) error {
	ctx, stop := interruptible(cmd)
	defer stop()
	client, closeConn, err := c.dialImages(ctx)
	if err != nil {
		return err
	}
	defer closeConn()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return plain(f(ctx, client))
}

// completeImages completes the first argument with what found returns.
func (c *ctl) completeImages(found func(context.Context, opsv1.ImagesClient) ([]cobra.Completion, error)) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		if cmd.Context() == nil {
			cmd.SetContext(context.Background())
		}
		var list []cobra.Completion
		err := c.call(cmd, func(ctx context.Context, client opsv1.ImagesClient) (err error) {
			list, err = found(ctx, client)
			return err
		})
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveError
		}
		return list, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveKeepOrder
	}
}

// printPulls writes a row for each pull, or m as a document.
func (c *ctl) printPulls(out io.Writer, m proto.Message, pulls []*opsv1.PullOperation) error {
	if c.output.structured() {
		return c.print(out, m)
	}
	if len(pulls) == 0 {
		_, err := fmt.Fprintln(out, "No pulls.")
		return err
	}
	columns := []string{"PULL", "IMAGE", "PHASE", "REASON", "DONE", "SIZE", "RATE", "AGE"}
	if c.output == wide {
		columns = append(columns, "ATTEMPT", "OWNER")
	}
	single := len(pulls) == 1
	if c.output == wide || single {
		columns = append(columns, "MESSAGE")
	}
	t := newTable(out, columns...)
	for _, op := range pulls {
		done, size, rate := "", "", ""
		if op.GetBytesTotal() > 0 {
			done, size = fmt.Sprintf("%d%%", 100*op.GetBytesDone()/op.GetBytesTotal()), bytesText(op.GetBytesTotal())
		}
		if op.GetBytesPerSecond() > 0 {
			rate = bytesText(op.GetBytesPerSecond()) + "/s"
		}
		row := []string{op.GetUid(), op.GetImage(), pullPhase(op), op.GetReason(), done, size, rate, c.age(op.GetCreateTime())}
		if c.output == wide {
			row = append(row, fmt.Sprint(op.GetAttempt()), op.GetOwner())
		}
		if c.output == wide || single {
			row = append(row, op.GetMessage())
		}
		t.row(row...)
	}
	return t.flush()
}

// printImages writes a row for each pin, then for what has been pulled without.
func (c *ctl) printImages(out io.Writer, pinned *opsv1.ListPinsResponse, pulls []*opsv1.PullOperation) error {
	type key struct{ image, owner string }
	shown := map[key]bool{}
	var rows [][]string
	const gone = "<gone>"
	for _, p := range pinned.GetPins() {
		shown[key{p.GetImage(), p.GetOwner()}] = true
		until := c.until(p.GetExpireTime().AsTime())
		if p.GetGone() {
			until = gone
		}
		rows = append(rows, []string{p.GetImage(), imageID(p.GetImageId()), bytesText(p.GetSizeBytes()), until, p.GetOwner()})
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
		_, err := fmt.Fprintln(out, "No images.")
		return err
	}
	t := newTable(out, "IMAGE", "IMAGE ID", "SIZE", "PINNED FOR", "OWNER")
	for _, r := range rows {
		t.row(r...)
	}
	return t.flush()
}

func (c *ctl) until(t time.Time) string {
	left := t.Sub(c.now())
	if left <= 0 {
		return "<ending>"
	}
	return duration.HumanDuration(left)
}

func imageID(id string) string {
	return fmt.Sprintf("%.12s", strings.TrimPrefix(id, "sha256:"))
}
