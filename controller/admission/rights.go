// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package admission

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// rightsEvery is how often Rights reads the policies, six small objects, by name.
const rightsEvery = 5 * time.Minute

// rightsPolicies are the names of the admission policies of deploy/rights and of their bindings.
// about says for which kinds a policy is.
var rightsPolicies = []struct{ name, about string }{
	{"inplacerollout.rights.cri-proxy.io", "InPlaceRollouts"},
	{"containerrecreaterequest.rights.cri-proxy.io", "ContainerRecreateRequests"},
	{"imagepulljob.rights.cri-proxy.io", "ImagePullJobs and ImageListPullJobs"},
}

// +kubebuilder:rbac:groups=admissionregistration.k8s.io,resources=validatingadmissionpolicies;validatingadmissionpolicybindings,resourceNames=inplacerollout.rights.cri-proxy.io;containerrecreaterequest.rights.cri-proxy.io;imagepulljob.rights.cri-proxy.io,verbs=get

// Rights reports when a policy of deploy/rights is missing, so that the API server does not ask
// users for rights of their own. It is a manager.Runnable.
type Rights struct {
	from  client.Reader
	log   logrus.FieldLogger
	gauge prometheus.Gauge

	told string
}

// NewRights registers its metric with r.
func NewRights(from client.Reader, log logrus.FieldLogger, r prometheus.Registerer) (*Rights, error) {
	gauge := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "criproxy_controller_rights_unasked",
		Help: "Admission policies of deploy/rights that are not in force: users are not asked for rights of their own.",
	})
	return &Rights{from: from, log: log, gauge: gauge}, r.Register(gauge)
}

// NeedLeaderElection implements manager.LeaderElectionRunnable: one replica reports.
func (*Rights) NeedLeaderElection() bool { return true }

// Start implements manager.Runnable.
func (r *Rights) Start(ctx context.Context) error {
	ticks := time.NewTicker(rightsEvery)
	defer ticks.Stop()
	for {
		r.look(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-ticks.C:
		}
	}
}

// look reports what has changed since the last look.
func (r *Rights) look(ctx context.Context) {
	var unasked, why []string
	for _, p := range rightsPolicies {
		reason, err := r.missing(ctx, p.name)
		if err != nil {
			if ctx.Err() == nil {
				r.log.WithError(err).WithField("policy", p.name).
					Warn("it is not known whether users are asked for rights of their own")
			}
			return
		}
		if reason != "" {
			unasked, why = append(unasked, p.about), append(why, reason)
		}
	}
	r.gauge.Set(float64(len(unasked)))
	text := strings.Join(why, "; ")
	if text == r.told {
		return
	}
	r.told = text
	if text == "" {
		r.log.Info("users are asked for rights of their own")
		return
	}
	r.log.Warnf("whoever may create %s in a namespace has the controller's rights there: %s; apply "+
		"deploy/rights/policies.yaml, or set rights.enabled of the chart",
		strings.Join(unasked, ", "), text)
}

// missing says why a policy is not in force. It returns "" if the policy is.
func (r *Rights) missing(ctx context.Context, name string) (string, error) {
	var policy admissionv1.ValidatingAdmissionPolicy
	var binding admissionv1.ValidatingAdmissionPolicyBinding
	switch err := r.from.Get(ctx, client.ObjectKey{Name: name}, &policy); {
	case apierrors.IsNotFound(err):
		return fmt.Sprintf("there is no ValidatingAdmissionPolicy %s", name), nil
	case apimeta.IsNoMatchError(err):
		return "the API server knows no ValidatingAdmissionPolicy", nil
	case err != nil:
		return "", err
	}
	switch err := r.from.Get(ctx, client.ObjectKey{Name: name}, &binding); {
	case apierrors.IsNotFound(err):
		return fmt.Sprintf("there is no ValidatingAdmissionPolicyBinding %s", name), nil
	case err != nil:
		return "", err
	case binding.Spec.PolicyName != name || !slices.Contains(binding.Spec.ValidationActions, admissionv1.Deny):
		return fmt.Sprintf("ValidatingAdmissionPolicyBinding %s does not deny", name), nil
	case binding.Spec.MatchResources != nil:
		return fmt.Sprintf("ValidatingAdmissionPolicyBinding %s leaves some out (matchResources)", name), nil
	}
	return "", nil
}
