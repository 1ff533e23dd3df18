// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"fmt"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
)

// The template of a workload is its user's. A rollout writes its images there once, and an annotation that says so. What
// somebody writes over them is newer, and wins: the rollout ends as Superseded, and the workload's own controller goes on. Otherwise
// the rollout and a GitOps controller would write the same object in turns, without end.

// supersededError says that somebody wants something else of a workload than the rollout does.
type supersededError struct{ text string }

func (e *supersededError) Error() string { return e.text }

func superseded(format string, args ...any) error {
	return &supersededError{fmt.Sprintf(format, args...) + " since this rollout has written it: that is newer, and the workload's own controller goes on from there"}
}

// templateKey is the rollout and the goal that a template was written for. A revision that comes again is another goal.
func (p *pass) templateKey() string {
	begun := int64(0)
	if t := p.rollout.Status.StartTime; t != nil {
		begun = t.Unix()
	}
	return fmt.Sprintf("%s/%s/%d", p.rollout.UID, p.goal.revision, begun)
}

// templateMark is the annotation of a workload whose template has these images when it is written.
func (p *pass) templateMark(images map[string]string) map[string]any {
	return map[string]any{inplace.TemplateAnnotation: p.templateKey() + "/" + hash(images)}
}

// noteTemplate keeps that the template is written, unless that went wrong: people who replace a workload as a whole take its annotation away.
func (p *pass) noteTemplate(err error) error {
	if err != nil {
		return err
	}
	if p.work.templated == nil {
		p.work.templated = map[string]bool{}
	}
	p.work.templated[p.goal.revision] = true
	return nil
}

// wroteTemplate says that the images of the goal have been in the template.
func (p *pass) wroteTemplate(o client.Object) bool {
	if p.work.templated[p.goal.revision] {
		return true
	}
	key, _ := cutLast(o.GetAnnotations()[inplace.TemplateAnnotation])
	_, paused := o.(*appsv1.Deployment) // has the annotation before its template is written
	return !paused && key == p.templateKey()
}

// cutLast takes the hash of the images off TemplateAnnotation.
func cutLast(text string) (key, sum string) {
	n := strings.LastIndexByte(text, '/')
	if n < 0 {
		return "", ""
	}
	return text[:n], text[n+1:]
}

// newer says why the rollout is about to end for something newer; empty when it is not. That is written down before anything is done
// about it: afterwards it might look as if the rollout had still to begin.
func (p *pass) newer() string {
	c := meta.FindStatusCondition(p.rollout.Status.Conditions, inplace.ConditionComplete)
	if c == nil || c.Reason != inplace.ReasonSuperseded || p.rollout.Status.CompletionTime != nil {
		return ""
	}
	return c.Message
}

// supersede ends the rollout for what somebody else wants: what nodes hold ready is taken back, gates are opened, the Deployment goes on.
func (p *pass) supersede(ctx context.Context, text string) error {
	next := p.rollout.Status.DeepCopy()
	next.ObservedGeneration, next.Message = p.rollout.Generation, text
	p.stand(next, false, inplace.ReasonSuperseded, text)
	if p.goal.undo {
		setCondition(next, inplace.ConditionDegraded, true, inplace.ReasonSuperseded, text)
	} else {
		setCondition(next, inplace.ConditionDegraded, false, inplace.ReasonAsExpected, "")
	}
	if p.newer() == "" {
		p.wait = stalePause
		return p.writeStatus(ctx, next)
	}
	done, err := p.stepBack(ctx, "the InPlaceRollout is superseded")
	if err != nil {
		return err
	}
	if !done {
		p.wait = sooner(p.wait, blockedPause)
		return nil
	}
	now := metav1.NewTime(p.now)
	next.CompletionTime = &now
	return p.end(ctx, next)
}
