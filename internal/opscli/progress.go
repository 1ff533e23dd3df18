// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package opscli

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// silent shows nothing.
type silent struct{}

func (silent) update(*opsv1.PullOperation) error { return nil }

// pullLines prints a line for every change and for every tenth of the image: for pipes and logs.
type pullLines struct {
	p      *Printer
	last   string
	tenths int64
}

func (l *pullLines) update(op *opsv1.PullOperation) error {
	state := pullState(op)
	tenths := tenthsOf(op)
	if state == l.last && (tenths == l.tenths || op.GetPhase() != opsv1.PullPhase_PULL_FETCHING) {
		return nil
	}
	l.last, l.tenths = state, tenths
	line := []string{l.p.clock(), op.GetImage(), state}
	if op.GetPhase() == opsv1.PullPhase_PULL_FETCHING {
		line = append(line, progressText(op))
	}
	return l.p.words("%s", strings.Join(line, " "))
}

// pullState is phase, reason and message of a pull in one line.
func pullState(op *opsv1.PullOperation) string {
	s := pullPhase(op)
	if op.GetReason() != "" {
		s += " (" + op.GetReason() + ")"
	}
	if op.GetMessage() != "" {
		s += ": " + strings.Join(strings.Fields(op.GetMessage()), " ")
	}
	return s
}

// pullPhase turns PULL_FETCHING into Fetching.
func pullPhase(op *opsv1.PullOperation) string {
	name := strings.TrimPrefix(op.GetPhase().String(), "PULL_")
	if op.GetPhase() == opsv1.PullPhase_PULL_PHASE_UNSPECIFIED {
		return "Unknown"
	}
	return name[:1] + strings.ToLower(name[1:])
}

// progressText is text such as "50 % of 1.0 GiB, 61.2 MiB/s, 8s left".
func progressText(op *opsv1.PullOperation) string {
	done, total, rate := op.GetBytesDone(), op.GetBytesTotal(), op.GetBytesPerSecond()
	if total == 0 {
		return ""
	}
	text := fmt.Sprintf("%d %% of %s", 100*done/total, bytesText(total))
	if rate > 0 && done < total {
		text += fmt.Sprintf(", %s/s, %s left", bytesText(rate), time.Duration((total-done+rate-1)/rate)*time.Second)
	}
	return text
}

// bars draws a bar for each layer over itself.
type bars struct {
	out  io.Writer
	size func() (width, height int)

	drawn int // lines
}

func (s *bars) update(op *opsv1.PullOperation) error {
	width, height := s.size()
	var b bytes.Buffer
	// A line that is too wide is cut, not wrapped, or more would have to be erased.
	b.WriteString("\x1b[?7l")
	if s.drawn > 0 {
		fmt.Fprintf(&b, "\x1b[%dA\x1b[J", s.drawn)
	}
	head := op.GetImage() + "  " + pullState(op)
	if p := progressText(op); p != "" && op.GetFinishTime() == nil {
		head += "  " + p
	}
	lines := append([]string{head}, layerLines(op, width, height-2)...)
	s.drawn = len(lines)
	for _, l := range lines {
		b.WriteString(l + "\n")
	}
	b.WriteString("\x1b[?7h")
	_, err := s.out.Write(b.Bytes())
	return err
}

// layerLines returns a line for each layer. If there is no room for all, it returns lines for those
// that are not done, and how many more there are.
func layerLines(op *opsv1.PullOperation, width, room int) []string {
	layers := op.GetLayers()
	if op.GetFinishTime() != nil {
		return nil
	}
	var left int
	if len(layers) > room {
		var open []*opsv1.LayerProgress
		for _, l := range layers {
			if l.GetBytesDone() < l.GetBytesTotal() {
				open = append(open, l)
			}
		}
		shown := open[:min(len(open), max(room-1, 0))]
		left, layers = len(layers)-len(shown), shown
	}
	var lines []string
	for _, l := range layers {
		lines = append(lines, layerLine(l, width))
	}
	if left > 0 {
		done := 0
		for _, l := range op.GetLayers() {
			if l.GetBytesDone() >= l.GetBytesTotal() {
				done++
			}
		}
		lines = append(lines, fmt.Sprintf("  and %d more layers; %d of %d are done", left, done, len(op.GetLayers())))
	}
	return lines
}

const (
	digestWidth = 12 // as docker shows layers
	minBar      = 5
	maxBar      = 40
)

func layerLine(l *opsv1.LayerProgress, width int) string {
	_, id, _ := strings.Cut(l.GetDigest(), ":")
	room := min(max(width-digestWidth-33, minBar), maxBar)
	return fmt.Sprintf("  %-12.12s %s  %10s of %s", id, bar(l.GetBytesDone(), l.GetBytesTotal(), room),
		bytesText(l.GetBytesDone()), bytesText(l.GetBytesTotal()))
}

// bar draws a bar such as "[====>    ]  50 %"; room is the width between the brackets.
func bar(done, total int64, room int) string {
	part := 1.0
	if total > 0 {
		part = float64(done) / float64(total)
	}
	full := int(part * float64(room))
	text := strings.Repeat("=", full)
	if full < room {
		text += ">" + strings.Repeat(" ", room-full-1)
	}
	return fmt.Sprintf("[%s] %3d %%", text, int(100*part))
}

// tenthsOf returns how many tenths of the image the node has.
func tenthsOf(op *opsv1.PullOperation) int64 {
	if op.GetBytesTotal() == 0 {
		return 0
	}
	return 10 * op.GetBytesDone() / op.GetBytesTotal()
}
