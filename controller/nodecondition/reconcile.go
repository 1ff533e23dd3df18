// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodecondition

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/workerpool"
)

const (
	// DefaultEvery is how often the controller asks a node. A bypass lasts until a person has
	// looked at the node, so minutes are soon enough. Meanwhile the node itself refuses the
	// commands that the bypass concerns.
	DefaultEvery = 5 * time.Minute
	// strangerEvery is how many times longer the controller waits with a node that has never
	// answered: the node may have no cri-proxy.
	strangerEvery = 6
	// patience is how many questions in a row a node may leave unanswered before its condition
	// becomes Unknown.
	patience = 3
	// jitter is the fraction by which the time between two questions varies.
	jitter = 0.1
)

// Reasons of the condition, and of the Events that go with a change of it.
const (
	ReasonInPath   = "InPath"   // False
	ReasonBypassed = "Bypassed" // True
	ReasonNoAnswer = "NoAnswer" // Unknown: it was there, and does not answer
)

// eventAction is the action of Events.
const eventAction = "Watch"

// Nodes asks nodes. [*nodes.Client] implements it.
type Nodes interface {
	// NodeInfo asks a node for its state. Errors are [*nodes.Error].
	NodeInfo(ctx context.Context, n nodes.Node) (*opsv1.NodeInfoResponse, error)
}

var _ Nodes = (*nodes.Client)(nil)

// Reconciler keeps the condition of Nodes. Client, Nodes and Log are required.
type Reconciler struct {
	Client   client.Client
	Nodes    Nodes
	NodePort int
	Recorder events.EventRecorder
	Metrics  *Metrics
	Log      logrus.FieldLogger
	// Every is how often the Reconciler asks a node; 0 means [DefaultEvery].
	Every time.Duration

	mu sync.Mutex // guards misses
	// misses counts the questions in a row that a node has left unanswered.
	misses map[string]int
}

// +kubebuilder:rbac:groups="",resources=nodes,verbs=get;list;watch
// +kubebuilder:rbac:groups="",resources=nodes/status,verbs=patch
// +kubebuilder:rbac:groups=events.k8s.io,resources=events,verbs=create;patch

// Reconcile asks one node and writes what has changed.
func (r *Reconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	node := &corev1.Node{}
	err := r.Client.Get(ctx, req.NamespacedName, node)
	if apierrors.IsNotFound(err) || err == nil && node.DeletionTimestamp != nil {
		r.forget(req.Name)
		return reconcile.Result{}, nil
	}
	if err != nil {
		return reconcile.Result{}, err
	}
	now := conditionOf(node, nodes.BypassedCondition)
	if ready := conditionOf(node, corev1.NodeReady); ready == nil || ready.Status != corev1.ConditionTrue {
		return r.again(1), nil // what is wrong is said already
	}
	where, err := nodes.Of(node, r.NodePort)
	if err != nil {
		return r.again(strangerEvery), nil
	}
	var info *opsv1.NodeInfoResponse
	workerpool.Away(ctx, func() { info, err = r.Nodes.NodeInfo(ctx, where) })
	if ctx.Err() != nil {
		return reconcile.Result{}, ctx.Err()
	}
	next := r.judge(req.Name, info, err, now)
	if next == nil {
		if now == nil {
			r.Metrics.is(req.Name, stateNone)
			return r.again(strangerEvery), nil
		}
		return r.again(1), nil
	}
	r.Metrics.is(req.Name, map[corev1.ConditionStatus]string{
		corev1.ConditionTrue: stateBypassed, corev1.ConditionFalse: stateInPath, corev1.ConditionUnknown: stateSilent,
	}[next.Status])
	if now == nil || now.Status != next.Status || now.Reason != next.Reason || now.Message != next.Message {
		if err := r.write(ctx, node, now, next); err != nil {
			return reconcile.Result{}, err
		}
	}
	return r.again(1), nil
}

// judge returns the condition that follows from the answer; nil if none does.
func (r *Reconciler) judge(
	name string, info *opsv1.NodeInfoResponse, err error, now *corev1.NodeCondition,
) *corev1.NodeCondition {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := &corev1.NodeCondition{Type: nodes.BypassedCondition}
	if err == nil {
		delete(r.misses, name)
		c.Status, c.Reason, c.Message = corev1.ConditionFalse, ReasonInPath, "kubelet's calls come through cri-proxy"
		if b := info.GetBypass(); b != "" {
			c.Status, c.Reason, c.Message = corev1.ConditionTrue, ReasonBypassed, "kubelet is led past cri-proxy "+b
		}
		return c
	}
	var nodeError *nodes.Error
	if now == nil && (!errors.As(err, &nodeError) || nodeError.Silent) {
		return nil // there may be no cri-proxy
	}
	if r.misses == nil {
		r.misses = map[string]int{}
	}
	if r.misses[name]++; r.misses[name] < patience {
		return nil
	}
	c.Status, c.Reason, c.Message = corev1.ConditionUnknown, ReasonNoAnswer, err.Error()
	if now != nil && now.Status == c.Status && now.Reason == c.Reason {
		c.Message = now.Message // that the words of the error vary is no change
	}
	return c
}

// write patches the condition and reports the change.
func (r *Reconciler) write(ctx context.Context, node *corev1.Node, now, next *corev1.NodeCondition) error {
	at := metav1.Now()
	change := map[string]any{
		"type": next.Type, "status": next.Status, "reason": next.Reason, "message": next.Message,
		"lastHeartbeatTime": at,
	}
	if now == nil || now.Status != next.Status {
		change["lastTransitionTime"] = at
	}
	body, err := json.Marshal(map[string]any{"status": map[string]any{"conditions": []any{change}}})
	if err != nil {
		return err
	}
	name := node.Name
	if err := r.Client.Status().Patch(ctx, node, client.RawPatch(types.StrategicMergePatchType, body)); err != nil {
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("condition of node %s: %w", name, err)
	}
	r.Metrics.wrote()
	r.Log.WithFields(logrus.Fields{"node": name, "status": next.Status, "reason": next.Reason}).
		Info("condition " + string(next.Type) + ": " + next.Message)
	kind := corev1.EventTypeWarning
	if next.Status == corev1.ConditionFalse {
		if now == nil {
			return nil // it has just been installed
		}
		kind = corev1.EventTypeNormal
	}
	if r.Recorder != nil {
		// the API's limit is 1024
		r.Recorder.Eventf(node, nil, kind, string(next.Type)+next.Reason, eventAction, "%.1000s", next.Message)
	}
	return nil
}

func (r *Reconciler) forget(name string) {
	r.mu.Lock()
	delete(r.misses, name)
	r.mu.Unlock()
	r.Metrics.is(name, "")
}

// again returns when to ask a node next, in units of Every.
func (r *Reconciler) again(times int) reconcile.Result {
	d := time.Duration(times) * r.every()
	spread := 2*rand.Float64() - 1 //nolint:gosec // it only spreads the load
	return reconcile.Result{RequeueAfter: d + time.Duration(spread*jitter*float64(d))}
}

func (r *Reconciler) every() time.Duration {
	if r.Every == 0 {
		return DefaultEvery
	}
	return r.Every
}

func conditionOf(node *corev1.Node, kind corev1.NodeConditionType) *corev1.NodeCondition {
	for i := range node.Status.Conditions {
		if node.Status.Conditions[i].Type == kind {
			return &node.Status.Conditions[i]
		}
	}
	return nil
}
