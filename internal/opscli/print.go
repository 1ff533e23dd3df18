// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package opscli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"k8s.io/apimachinery/pkg/util/duration"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// Format is the form of the output. It implements [pflag.Value].
type Format string

// The formats.
const (
	Table Format = "table"
	Wide  Format = "wide"
	JSON  Format = "json"
	YAML  Format = "yaml"
)

// Formats lists the formats, for help and completion.
func Formats() []string {
	return []string{string(JSON), string(YAML), string(Table), string(Wide)}
}

// String implements [pflag.Value].
func (f *Format) String() string { return string(*f) }

// Set implements [pflag.Value].
func (f *Format) Set(s string) error {
	if !slices.Contains(Formats(), s) {
		return fmt.Errorf("%q: want %s", s, strings.Join(Formats(), ", "))
	}
	*f = Format(s)
	return nil
}

// Type implements [pflag.Value].
func (*Format) Type() string { return "format" }

func (f Format) structured() bool { return f == JSON || f == YAML }

// Printer shows answers of the daemon.
type Printer struct {
	Out    io.Writer
	Format Format
	// Now is the clock for ages.
	Now func() time.Time
}

// to returns a copy of p that writes to out.
func (p *Printer) to(out io.Writer) *Printer {
	other := *p
	other.Out = out
	return &other
}

// words writes a line for people.
func (p *Printer) words(format string, args ...any) error {
	_, err := fmt.Fprintf(p.Out, format+"\n", args...)
	return err
}

// message writes a message as JSON or YAML.
func (p *Printer) message(m proto.Message) error {
	raw, err := protojson.Marshal(m)
	if err != nil {
		return fmt.Errorf("output: %w", err)
	}
	var b bytes.Buffer
	if p.Format == YAML {
		// JSON is YAML; only the style changes, so the order of the fields stays.
		var doc yaml.Node
		if err := yaml.Unmarshal(raw, &doc); err != nil {
			return fmt.Errorf("output: %w", err)
		}
		blockStyle(&doc)
		b.WriteString("---\n")
		e := yaml.NewEncoder(&b)
		e.SetIndent(2)
		if err := e.Encode(&doc); err != nil {
			return fmt.Errorf("output: %w", err)
		}
	} else {
		// protojson varies its white space on purpose.
		if err := json.Indent(&b, raw, "", "  "); err != nil {
			return fmt.Errorf("output: %w", err)
		}
		b.WriteByte('\n')
	}
	_, err = p.Out.Write(b.Bytes())
	return err
}

func blockStyle(n *yaml.Node) {
	n.Style = 0
	for _, c := range n.Content {
		blockStyle(c)
	}
}

// Operation writes one operation, with a row for each of its containers.
func (p *Printer) Operation(op *opsv1.Operation) error {
	if p.Format.structured() {
		return p.message(op)
	}
	columns := []string{"OPERATION", "POD", "CONTAINER", "PHASE", "ATTEMPT", "EXIT", "GAP", "AGE"}
	images := slices.ContainsFunc(op.GetContainers(), func(r *opsv1.ContainerOperation) bool {
		return r.GetImage() != ""
	})
	if p.Format == Wide {
		if images {
			columns = append(columns, "IMAGE")
		}
		columns = append(columns, "INCUMBENT", "SUCCESSOR", "REQUESTER")
	}
	t := newTable(p.Out, append(columns, "MESSAGE")...)
	for _, r := range op.GetContainers() {
		row := []string{
			op.GetUid(), podName(op.GetPod()), r.GetName(), phaseName(r.GetPhase()),
			attempt(r), exitCode(r), gap(r), p.age(op.GetCreateTime()),
		}
		if p.Format == Wide && images {
			row = append(row, r.GetImage())
		}
		if p.Format == Wide {
			row = append(row, shortID(r.GetIncumbentId()), shortID(r.GetSuccessorId()), op.GetRequester())
		}
		t.row(append(row, containerNote(r))...)
	}
	if len(op.GetContainers()) == 0 {
		t.row(op.GetUid(), podName(op.GetPod()), "", phaseName(op.GetPhase()), "", "", "",
			p.age(op.GetCreateTime()), op.GetMessage())
	}
	return t.flush()
}

// Operations writes a row for each operation.
func (p *Printer) Operations(l *opsv1.ListOperationsResponse) error {
	if p.Format.structured() {
		return p.message(l)
	}
	if len(l.GetOperations()) == 0 {
		return p.words("No operations.")
	}
	t := newTable(p.Out, p.listColumns()...)
	for _, op := range l.GetOperations() {
		t.row(p.listRow(op)...)
	}
	return t.flush()
}

func (p *Printer) listColumns() []string {
	columns := []string{"OPERATION", "KIND", "POD", "CONTAINERS", "PHASE", "DURATION", "AGE"}
	if p.Format == Wide {
		columns = append(columns, "IMAGES", "REQUESTER", "MESSAGE")
	}
	return columns
}

func (p *Printer) listRow(op *opsv1.Operation) []string {
	var names, images []string
	for _, r := range op.GetContainers() {
		names = append(names, r.GetName())
		if r.GetImage() != "" {
			images = append(images, r.GetImage())
		}
	}
	end := p.Now()
	if op.GetFinishTime() != nil {
		end = op.GetFinishTime().AsTime()
	}
	took := end.Sub(op.GetCreateTime().AsTime())
	row := []string{
		op.GetUid(), op.GetKind(), podName(op.GetPod()), strings.Join(names, ","),
		phaseName(op.GetPhase()), shortDuration(took), p.age(op.GetCreateTime()),
	}
	if p.Format == Wide {
		row = append(row, strings.Join(images, ","), op.GetRequester(), op.GetMessage())
	}
	return row
}

// tableWriter aligns columns as kubectl does.
type tableWriter struct {
	w   *tabwriter.Writer
	err error
}

func newTable(out io.Writer, columns ...string) *tableWriter {
	t := &tableWriter{w: tabwriter.NewWriter(out, 6, 4, 3, ' ', 0)}
	t.row(columns...)
	return t
}

// row adds a row. It takes line breaks and tabs out of messages, which would break the table.
func (t *tableWriter) row(cells ...string) {
	for i, cell := range cells {
		cells[i] = strings.Join(strings.Fields(cell), " ")
	}
	if _, err := fmt.Fprintln(t.w, strings.Join(cells, "\t")); t.err == nil {
		t.err = err
	}
}

func (t *tableWriter) flush() error {
	if err := t.w.Flush(); t.err == nil {
		t.err = err
	}
	return t.err
}

func (p *Printer) age(t *timestamppb.Timestamp) string {
	if t == nil {
		return "<unknown>"
	}
	return duration.HumanDuration(max(0, p.Now().Sub(t.AsTime())))
}

func podName(p *opsv1.PodRef) string { return p.GetNamespace() + "/" + p.GetName() }

// phaseName turns PHASE_STAGING into Staging.
func phaseName(p opsv1.Phase) string {
	name := strings.TrimPrefix(p.String(), "PHASE_")
	if p == opsv1.Phase_PHASE_UNSPECIFIED || name == "" {
		return "Unknown"
	}
	return name[:1] + strings.ToLower(name[1:])
}

// containerNote returns the message of a container, its pull and its warnings, for the last column.
func containerNote(r *opsv1.ContainerOperation) string {
	notes := slices.Clone(r.GetWarnings())
	for i := range notes {
		notes[i] = "warning: " + notes[i]
	}
	if p := r.GetPull(); pulling(r) {
		text := pullState(p)
		if p.GetPhase() == opsv1.PullPhase_PULL_FETCHING {
			text += " " + progressText(p)
		}
		notes = slices.Insert(notes, 0, strings.TrimSpace(text))
	}
	if r.GetMessage() != "" {
		notes = slices.Insert(notes, 0, r.GetMessage())
	}
	return strings.Join(notes, "; ")
}

// pulling reports whether the image update of a container waits for its pull.
func pulling(r *opsv1.ContainerOperation) bool {
	return r.GetPhase() == opsv1.Phase_PHASE_PULLING && r.GetPull() != nil
}

func attempt(r *opsv1.ContainerOperation) string {
	if r.GetSuccessorId() == "" {
		return ""
	}
	return strconv.FormatUint(uint64(r.GetAttempt()), 10)
}

// exitCode is empty until the incumbent has stopped.
func exitCode(r *opsv1.ContainerOperation) string {
	if r.GetStopTime() == nil {
		return ""
	}
	return strconv.FormatInt(int64(r.GetExitCode()), 10)
}

func gap(r *opsv1.ContainerOperation) string {
	if r.GetGap() == nil {
		return ""
	}
	return shortDuration(r.GetGap().AsDuration())
}

// shortDuration keeps milliseconds below ten seconds: they are what a restart takes.
func shortDuration(d time.Duration) string {
	if d < 10*time.Second {
		return d.Round(time.Millisecond).String()
	}
	return duration.HumanDuration(d)
}

// shortID is the form that crictl shows.
func shortID(id string) string {
	if len(id) > 13 {
		return id[:13]
	}
	return id
}
