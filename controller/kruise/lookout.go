// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package kruise

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
)

const (
	// Every is how often the Lookout asks the API server three small questions.
	Every = 10 * time.Second
	// soon is how soon it asks again after an error, before it knows anything.
	soon = time.Second
	// patience is the timeout of one look.
	patience = 10 * time.Second

	// DaemonSet is the name of OpenKruise's node daemon, in whatever namespace.
	DaemonSet = "kruise-daemon"
	// MutatingWebhooks is the name of OpenKruise's mutating webhook configuration.
	MutatingWebhooks = "kruise-mutating-webhook-configuration"
	// ValidatingWebhooks is the name of OpenKruise's validating webhook configuration.
	ValidatingWebhooks = "kruise-validating-webhook-configuration"
)

// Kinds names the kinds that OpenKruise and cri-proxy carry out, for people.
const Kinds = "ContainerRecreateRequest, ImagePullJob and ImageListPullJob"

// served lists the kinds, in the versions that the controller reads.
var served = []schema.GroupVersionKind{
	appsv1alpha1.GroupVersion.WithKind("ContainerRecreateRequest"),
	v1beta1.GroupVersion.WithKind("ImagePullJob"),
	v1beta1.GroupVersion.WithKind("ImageListPullJob"),
}

// +kubebuilder:rbac:groups=admissionregistration.k8s.io,resources=mutatingwebhookconfigurations,resourceNames=kruise-mutating-webhook-configuration,verbs=get
// +kubebuilder:rbac:groups=admissionregistration.k8s.io,resources=validatingwebhookconfigurations,resourceNames=kruise-validating-webhook-configuration,verbs=get
// +kubebuilder:rbac:groups=apps,resources=daemonsets,verbs=list

// Lookout sees whether OpenKruise is in the cluster. It is a manager.Runnable of each replica,
// since each replica has a readiness probe.
type Lookout struct {
	// Reader reads past the cache: a replica that does not lead has none.
	Reader client.Reader
	// Mapper knows what the API server serves.
	Mapper meta.RESTMapper
	// Log must be set.
	Log logrus.FieldLogger
	// Every is how often the Lookout looks; 0 means [Every].
	Every time.Duration

	mu      sync.Mutex
	looked  bool
	there   bool
	absent  int    // looks in a row without OpenKruise
	reason  string // why the kinds are not carried out; empty: they are
	changed chan struct{}
}

// NeedLeaderElection implements manager.LeaderElectionRunnable.
func (*Lookout) NeedLeaderElection() bool { return false }

// Start looks until ctx is done. It returns nil.
func (l *Lookout) Start(ctx context.Context) error {
	if l.Every == 0 {
		l.Every = Every
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		wait := l.Every
		if err := l.look(ctx); err != nil && ctx.Err() == nil {
			wait = l.puzzled(err)
		}
		timer.Reset(wait)
	}
}

// Free reports whether cri-proxy carries out the kinds, and if not, why not. The channel is closed
// when the answer changes.
func (l *Lookout) Free() (free bool, reason string, changed <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.changed == nil {
		l.changed = make(chan struct{})
	}
	reason = l.reason
	if !l.looked {
		reason = "it is not known yet whether OpenKruise is in the cluster"
	}
	return l.looked && reason == "", reason, l.changed
}

// Alone reports that OpenKruise is known not to be in the cluster. The channel is closed when the
// answer may have changed.
func (l *Lookout) Alone() (alone bool, changed <-chan struct{}) {
	_, _, changed = l.Free()
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.looked && !l.there, changed
}

// Look asks once whether OpenKruise is in the cluster.
func (l *Lookout) Look(ctx context.Context) (bool, error) {
	seen, err := l.signs(ctx)
	return len(seen) > 0, err
}

// There reports whether OpenKruise is in the cluster.
func (l *Lookout) There() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.there
}

// Note is what a readiness probe says about OpenKruise; "" if there is nothing to say.
func (l *Lookout) Note() string {
	_, reason, _ := l.Free()
	return reason
}

// puzzled notes that the API server did not answer. The last answer still counts; if there is none,
// nothing begins.
func (l *Lookout) puzzled(err error) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.looked {
		l.Log.WithError(err).Warn("whether OpenKruise is in the cluster could not be found out again")
		return l.Every
	}
	l.Log.WithError(err).Warn("whether OpenKruise is in the cluster could not be found out: " + Kinds +
		" are not carried out until then")
	return soon
}

// look asks once.
func (l *Lookout) look(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	seen, err := l.signs(ctx)
	if err != nil {
		return err
	}
	var missing []string
	if len(seen) == 0 {
		if missing, err = l.missing(); err != nil {
			return err
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(seen) == 0 {
		l.absent++
		if l.there && l.absent < 2 {
			return nil // a daemon that is being replaced, perhaps
		}
	} else {
		l.absent = 0
	}
	reason := ""
	switch {
	case len(seen) > 0:
		reason = fmt.Sprintf("%s are left to OpenKruise, which is in the cluster (%s); see docs/MIGRATION.md", Kinds,
			strings.Join(seen, ", "))
	case len(missing) > 0:
		reason = fmt.Sprintf("%s are not carried out: the API server does not serve %s; apply the custom resource "+
			"definitions of deploy/crds",
			Kinds, strings.Join(missing, ", "))
	}
	if l.looked && reason == l.reason {
		return nil
	}
	if reason != "" {
		l.Log.Warn(reason)
	} else {
		l.Log.Info(Kinds + " are carried out: OpenKruise is not in the cluster")
	}
	l.looked, l.there, l.reason = true, len(seen) > 0, reason
	if l.changed != nil {
		close(l.changed)
	}
	l.changed = make(chan struct{})
	return nil
}

// signs returns the parts of OpenKruise that are in the cluster.
func (l *Lookout) signs(ctx context.Context) ([]string, error) {
	var seen []string
	for _, hooks := range []struct{ kind, name string }{
		{"MutatingWebhookConfiguration", MutatingWebhooks}, {"ValidatingWebhookConfiguration", ValidatingWebhooks},
	} {
		o := partial(hooks.kind)
		err := l.Reader.Get(ctx, client.ObjectKey{Name: hooks.name}, o)
		if err != nil && !apierrors.IsNotFound(err) {
			return nil, err
		}
		if err == nil {
			seen = append(seen, hooks.kind+" "+hooks.name)
		}
	}
	daemons := &metav1.PartialObjectMetadataList{}
	daemons.SetGroupVersionKind(schema.GroupVersionKind{Group: "apps", Version: "v1", Kind: "DaemonSetList"})
	if err := l.Reader.List(ctx, daemons, client.MatchingFields{"metadata.name": DaemonSet}); err != nil {
		return nil, err
	}
	for i := range daemons.Items {
		seen = append(seen, "DaemonSet "+daemons.Items[i].Namespace+"/"+daemons.Items[i].Name)
	}
	return seen, nil
}

func partial(kind string) *metav1.PartialObjectMetadata {
	o := &metav1.PartialObjectMetadata{}
	o.SetGroupVersionKind(schema.GroupVersionKind{Group: "admissionregistration.k8s.io", Version: "v1", Kind: kind})
	return o
}

// missing returns the kinds that the API server does not serve in the version that the controller
// reads: OpenKruise before 1.9 has no v1beta1 of jobs, and its definitions stay when it goes.
func (l *Lookout) missing() ([]string, error) {
	var missing []string
	var errs []error
	for _, kind := range served {
		_, err := l.Mapper.RESTMapping(kind.GroupKind(), kind.Version)
		switch {
		case meta.IsNoMatchError(err):
			missing = append(missing, kind.Kind+" in "+kind.GroupVersion().String())
		case err != nil:
			errs = append(errs, err)
		}
	}
	return missing, errors.Join(errs...)
}
