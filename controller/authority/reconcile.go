// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"context"
	"fmt"
	"time"

	"github.com/sirupsen/logrus"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"

	"github.com/cri-proxy/cri-proxy/api/identity"
)

// +kubebuilder:rbac:groups=certificates.k8s.io,resources=certificatesigningrequests,verbs=get;list;watch
// +kubebuilder:rbac:groups=certificates.k8s.io,resources=certificatesigningrequests/approval,verbs=update
// +kubebuilder:rbac:groups=certificates.k8s.io,resources=certificatesigningrequests/status,verbs=update
// +kubebuilder:rbac:groups=certificates.k8s.io,resources=signers,resourceNames=cri-proxy.io/node,verbs=approve;sign
// +kubebuilder:rbac:groups="",resources=nodes,verbs=get;list;watch
// +kubebuilder:rbac:groups=events.k8s.io,resources=events,verbs=create;patch

// reasonApproved is the reason of the condition; check.go has the reasons of refusals.
const (
	reasonApproved = "NodeVerified"
	reasonGone     = "NoSuchNode"
	eventAction    = "Sign"
)

// Signer approves and signs the requests of nodes. All fields are required.
type Signer struct {
	Authority *Authority
	Recorder  events.EventRecorder
}

// CacheOptions restricts the cache to the CertificateSigningRequests for this signer.
func CacheOptions() cache.ByObject {
	return cache.ByObject{Field: fields.OneTermEqualSelector("spec.signerName", identity.SignerName)}
}

// SetupWithManager adds the signer to a manager.
func (s *Signer) SetupWithManager(m manager.Manager, workers int) error {
	return builder.ControllerManagedBy(m).
		Named("certificatesigningrequest").
		For(&certificatesv1.CertificateSigningRequest{},
			builder.WithPredicates(predicate.NewPredicateFuncs(func(o client.Object) bool {
				r, ok := o.(*certificatesv1.CertificateSigningRequest)
				return ok && open(r)
			}))).
		WithOptions(controller.Options{MaxConcurrentReconciles: workers}).
		Complete(s)
}

// open reports whether the request still waits for a decision.
func open(r *certificatesv1.CertificateSigningRequest) bool {
	return r.Spec.SignerName == identity.SignerName && len(r.Status.Certificate) == 0 &&
		!has(r, certificatesv1.CertificateDenied) && !has(r, certificatesv1.CertificateFailed)
}

func has(r *certificatesv1.CertificateSigningRequest, kind certificatesv1.RequestConditionType) bool {
	for _, c := range r.Status.Conditions {
		if c.Type == kind {
			return true
		}
	}
	return false
}

// Reconcile implements reconcile.Reconciler.
func (s *Signer) Reconcile(ctx context.Context, request ctrl.Request) (ctrl.Result, error) {
	a := s.Authority
	var r certificatesv1.CertificateSigningRequest
	if err := a.Client.Get(ctx, request.NamespacedName, &r); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if !open(&r) {
		return ctrl.Result{}, nil
	}
	ca := a.signer()
	if ca == nil {
		return ctrl.Result{RequeueAfter: maintainRetry}, nil
	}
	err := s.decide(ctx, &r, ca)
	if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
		return ctrl.Result{RequeueAfter: time.Second}, nil // somebody was faster, or the cache is behind
	}
	return ctrl.Result{}, err
}

// decide denies the request, or approves and signs it.
func (s *Signer) decide(ctx context.Context, r *certificatesv1.CertificateSigningRequest, ca *pair) error {
	a := s.Authority
	name, no := requesterOf(r)
	if no != nil {
		return s.refuse(ctx, r, nil, no)
	}
	var n corev1.Node
	switch err := a.Reader.Get(ctx, client.ObjectKey{Name: name}, &n); {
	case apierrors.IsNotFound(err) || err == nil && n.DeletionTimestamp != nil:
		return s.refuse(ctx, r, nil, refuse(reasonGone, "there is no Node %s, or it is being removed", name))
	case err != nil:
		return err
	}
	template, public, no := check(r, &n)
	if no != nil {
		return s.refuse(ctx, r, &n, no)
	}
	if !has(r, certificatesv1.CertificateApproved) {
		r.Status.Conditions = append(r.Status.Conditions,
			condition(certificatesv1.CertificateApproved, reasonApproved,
				"the requester is the node that the certificate is for"))
		if err := a.Client.SubResource("approval").Update(ctx, r); err != nil {
			return fmt.Errorf("approving: %w", err)
		}
	}
	life := a.Settings.Life
	if e := r.Spec.ExpirationSeconds; e != nil {
		life = min(life, time.Duration(*e)*time.Second)
	}
	c, err := ca.sign(template, public, time.Now(), life)
	if err != nil {
		return err
	}
	r.Status.Certificate = encode(c)
	if err := a.Client.Status().Update(ctx, r); err != nil {
		return fmt.Errorf("signing: %w", err)
	}
	a.Metrics.request("Signed")
	a.Log.WithFields(logrus.Fields{"node": n.Name, "request": r.Name, "until": c.NotAfter.Format(time.RFC3339),
		"serial": c.SerialNumber.Text(16)}).Info("node certificate signed")
	return nil
}

// refuse writes the reason into the request, an Event and the log. A bad request gets no
// certificate either when a person has approved it by hand.
func (s *Signer) refuse(
	ctx context.Context, r *certificatesv1.CertificateSigningRequest, n *corev1.Node, no *refusal,
) error {
	a := s.Authority
	var err error
	if has(r, certificatesv1.CertificateApproved) {
		r.Status.Conditions = append(r.Status.Conditions,
			condition(certificatesv1.CertificateFailed, no.reason, no.message))
		err = a.Client.Status().Update(ctx, r)
	} else {
		r.Status.Conditions = append(r.Status.Conditions,
			condition(certificatesv1.CertificateDenied, no.reason, no.message))
		err = a.Client.SubResource("approval").Update(ctx, r)
	}
	if err != nil {
		return fmt.Errorf("denying: %w", err)
	}
	a.Metrics.request(no.reason)
	a.Log.WithFields(logrus.Fields{"request": r.Name, "requester": r.Spec.Username, "reason": no.reason}).
		Warn("node certificate denied: " + no.message)
	// The interface must not hold a nil *Node.
	if n != nil {
		s.Recorder.Eventf(r, n, corev1.EventTypeWarning, no.reason, eventAction, "%s", no.message)
	} else {
		s.Recorder.Eventf(r, nil, corev1.EventTypeWarning, no.reason, eventAction, "%s", no.message)
	}
	return nil
}

func condition(
	kind certificatesv1.RequestConditionType, reason, message string,
) certificatesv1.CertificateSigningRequestCondition {
	return certificatesv1.CertificateSigningRequestCondition{Type: kind, Status: corev1.ConditionTrue, Reason: reason,
		Message: message, LastUpdateTime: metav1.Now()}
}
