// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ctl

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

// format is the value of -o.
type format string

const (
	table    format = "table"
	wide     format = "wide"
	jsonForm format = "json"
	yamlForm format = "yaml"
)

func formats() []string {
	return []string{string(jsonForm), string(yamlForm), string(table), string(wide)}
}

// String implements [pflag.Value].
func (f *format) String() string { return string(*f) }

// Set implements [pflag.Value].
func (f *format) Set(s string) error {
	if !slices.Contains(formats(), s) {
		return fmt.Errorf("%q: want %s", s, strings.Join(formats(), ", "))
	}
	*f = format(s)
	return nil
}

// Type implements [pflag.Value].
func (*format) Type() string { return "format" }

func (f format) structured() bool { return f == jsonForm || f == yamlForm }

// print writes a message as JSON or YAML.
func (c *ctl) print(out io.Writer, m proto.Message) error {
	raw, err := protojson.Marshal(m)
	if err != nil {
		return fmt.Errorf("output: %w", err)
	}
	var b bytes.Buffer
	if c.output == yamlForm {
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
	_, err = out.Write(b.Bytes())
	return err
}

func blockStyle(n *yaml.Node) {
	n.Style = 0
	for _, c := range n.Content {
		blockStyle(c)
	}
}

// printOperation writes one operation with a row for each of its containers.
func (c *ctl) printOperation(out io.Writer, op *opsv1.Operation) error {
	if c.output.structured() {
		return c.print(out, op)
	}
	columns := []string{"OPERATION", "POD", "CONTAINER", "PHASE", "ATTEMPT", "EXIT", "GAP", "AGE"}
	images := slices.ContainsFunc(op.GetContainers(), func(r *opsv1.ContainerOperation) bool { return r.GetImage() != "" })
	if c.output == wide {
		if images {
			columns = append(columns, "IMAGE")
		}
		columns = append(columns, "INCUMBENT", "SUCCESSOR", "REQUESTER")
	}
	t := newTable(out, append(columns, "MESSAGE")...)
	for _, r := range op.GetContainers() {
		row := []string{op.GetUid(), podName(op.GetPod()), r.GetName(), phaseName(r.GetPhase()), attempt(r), exitCode(r), gap(r), c.age(op.GetCreateTime())}
		if c.output == wide && images {
			row = append(row, r.GetImage())
		}
		if c.output == wide {
			row = append(row, shortID(r.GetIncumbentId()), shortID(r.GetSuccessorId()), op.GetRequester())
		}
		t.row(append(row, containerNote(r))...)
	}
	if len(op.GetContainers()) == 0 {
		t.row(op.GetUid(), podName(op.GetPod()), "", phaseName(op.GetPhase()), "", "", "", c.age(op.GetCreateTime()), op.GetMessage())
	}
	return t.flush()
}

// printList writes a row for each operation.
func (c *ctl) printList(out io.Writer, l *opsv1.ListOperationsResponse) error {
	if c.output.structured() {
		return c.print(out, l)
	}
	if len(l.GetOperations()) == 0 {
		_, err := fmt.Fprintln(out, "No operations.")
		return err
	}
	t := newTable(out, c.listColumns()...)
	for _, op := range l.GetOperations() {
		t.row(c.listRow(op)...)
	}
	return t.flush()
}

func (c *ctl) listColumns() []string {
	columns := []string{"OPERATION", "KIND", "POD", "CONTAINERS", "PHASE", "DURATION", "AGE"}
	if c.output == wide {
		columns = append(columns, "IMAGES", "REQUESTER", "MESSAGE")
	}
	return columns
}

func (c *ctl) listRow(op *opsv1.Operation) []string {
	var names, images []string
	for _, r := range op.GetContainers() {
		names = append(names, r.GetName())
		if r.GetImage() != "" {
			images = append(images, r.GetImage())
		}
	}
	end := c.now()
	if op.GetFinishTime() != nil {
		end = op.GetFinishTime().AsTime()
	}
	took := end.Sub(op.GetCreateTime().AsTime())
	row := []string{op.GetUid(), op.GetKind(), podName(op.GetPod()), strings.Join(names, ","), phaseName(op.GetPhase()), shortDuration(took), c.age(op.GetCreateTime())}
	if c.output == wide {
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

// row adds a row. Nothing that a message holds may break the table.
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

func (c *ctl) age(t *timestamppb.Timestamp) string {
	if t == nil {
		return "<unknown>"
	}
	return duration.HumanDuration(max(0, c.now().Sub(t.AsTime())))
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

// containerNote is what there is to say about a container beyond its columns.
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

// pulling reports whether the pull is what a container's upgrade waits for.
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
