// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"fmt"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/objects"
)

// The template of a workload belongs to its user. A rollout writes its images there once, with an
// annotation that says so. If somebody writes other images over them, those are newer and win: the
// rollout ends as Superseded, and the workload's own controller goes on. Otherwise the rollout and
// a GitOps controller would overwrite each other without end.

// SupersededError says that somebody wants something else from the workload than the rollout does.
type SupersededError struct{ Text string }

func (e *SupersededError) Error() string { return e.Text }

func superseded(format string, args ...any) error {
	return &SupersededError{fmt.Sprintf(format, args...) +
		" since this rollout has written it: that is newer, and the workload's own controller goes on from there"}
}

// templateKey names the rollout and the goal that a template was written for. The same revision at
// another time is another goal.
func (e *Env) templateKey() string {
	begun := int64(0)
	if t := e.Rollout.Status.StartTime; t != nil {
		begun = t.Unix()
	}
	return fmt.Sprintf("%s/%s/%d", e.Rollout.UID, e.Goal.Revision, begun)
}

// templateMark returns the annotation of a workload whose template gets these images.
func (e *Env) templateMark(images map[string]string) map[string]any {
	return map[string]any{inplace.TemplateAnnotation: e.templateKey() + "/" + objects.Hash(images)}
}

// noteTemplate remembers that the template was written, unless err says that it was not. The
// annotation is not enough: people who replace a workload as a whole remove it.
func (e *Env) noteTemplate(err error) error {
	if err != nil {
		return err
	}
	if e.Memory.templated == nil {
		e.Memory.templated = map[string]bool{}
	}
	e.Memory.templated[e.Goal.Revision] = true
	return nil
}

// wroteTemplate returns true if the template has had the images of the goal.
func (e *Env) wroteTemplate(o client.Object) bool {
	if e.Memory.templated[e.Goal.Revision] {
		return true
	}
	key, _ := cutLast(o.GetAnnotations()[inplace.TemplateAnnotation])
	_, paused := o.(*appsv1.Deployment) // has the annotation before its template is written
	return !paused && key == e.templateKey()
}

// cutLast splits TemplateAnnotation into the key and the hash of the images.
func cutLast(text string) (key, sum string) {
	n := strings.LastIndexByte(text, '/')
	if n < 0 {
		return "", ""
	}
	return text[:n], text[n+1:]
}

// Newer says why the rollout is about to end as Superseded; empty if it is not. The status says so
// before anything else is done: afterwards it might look as if the rollout had not begun yet.
func Newer(r *inplace.InPlaceRollout) string {
	c := meta.FindStatusCondition(r.Status.Conditions, inplace.ConditionComplete)
	if c == nil || c.Reason != inplace.ReasonSuperseded || r.Status.CompletionTime != nil {
		return ""
	}
	return c.Message
}
