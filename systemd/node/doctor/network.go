// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

const (
	// soon is how long before its end a certificate from files deserves a warning, so that a person
	// can renew it. For a certificate with a short life, which a program renews, it is a third of
	// that life: cert-manager, for example, renews after two thirds.
	soon = 7 * 24 * time.Hour
	// overdue is how late a new certificate may be before something is wrong, even if the daemon
	// reports no problem: it asks in time, and the controller answers within a minute.
	overdue = 15 * time.Minute
	// quietController is how long the controller may be silent before something may be wrong: it
	// asks every node that it knows every few minutes.
	quietController = 20 * time.Minute
)

// network checks what the controller needs.
func (x *examination) network() {
	const check = "controller"
	o := x.config.Ops
	if o.Address == "" {
		x.ok(check, "ops.address is not set: commands come over %s only", x.config.AdminSocket)
		return
	}
	switch i := x.info.GetIdentity(); {
	case o.Enrol.Kubeconfig == "":
		x.certificateFiles()
	case x.info == nil:
		x.warn("certificate", "", "the daemon, which asks the controller for it, does not answer")
	default:
		x.enrolled(i)
	}
	x.clock()
	if x.info == nil {
		return
	}
	at, up := x.info.GetControllerLastCall(), x.o.Now().Sub(x.info.GetStartTime().AsTime())
	hint := "is the controller running, does it reach " + o.Address + " of this node, and do the certificates " +
		"fit? Refused clients are in journalctl -u 'cri-proxy@*'"
	switch {
	case at == nil && up > quietController:
		x.warn(check, hint, "not heard of in the %s since cri-proxy started", round(up))
	case at == nil:
		x.ok(check, "not heard of yet, %s after the start of cri-proxy", round(up))
	case x.o.Now().Sub(at.AsTime()) > quietController:
		x.warn(check, hint, "%s last called %s ago", x.info.GetControllerName(), round(x.o.Now().Sub(at.AsTime())))
	default:
		x.ok(check, "%s called %s ago", x.info.GetControllerName(), round(x.o.Now().Sub(at.AsTime())))
	}
}

// certificateFiles checks the certificate and the CA in files.
func (x *examination) certificateFiles() {
	const check = "certificate"
	o := x.config.Ops
	pair, err := tls.LoadX509KeyPair(o.CertFile, o.KeyFile)
	if err != nil {
		x.fail(check, "give ops.certFile and ops.keyFile PEM files that belong together", "%v", err)
		return
	}
	leaf, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		x.fail(check, "", "%s: %v", o.CertFile, err)
		return
	}
	if now := x.o.Now(); now.Before(leaf.NotBefore) {
		x.fail(check, "is the clock of this machine right?", "%s is not valid before "+
			"%s, it is %s", o.CertFile, leaf.NotBefore.Local().Format(time.RFC3339), now.Local().Format(time.RFC3339))
	} else {
		x.certificateFile(leaf)
	}
	if err := leaf.VerifyHostname(x.config.NodeName); err != nil {
		x.fail(check, "issue one with DNS name "+x.config.NodeName+": the controller insists on it",
			"%s: %v", o.CertFile, err)
	}
	if err := checkCA(o.ClientCAFile, x.o.Now()); err != nil {
		x.fail(check, "give ops.clientCAFile the PEM certificates of who signs the controller's", "%v", err)
	}
}

// enrolled checks the certificate that the daemon gets from the controller, and renews by itself.
func (x *examination) enrolled(i *opsv1.Identity) {
	const check = "certificate"
	now, end, renewal := x.o.Now(), i.GetExpireTime().AsTime(), i.GetRenewTime().AsTime()
	hint := "is cri-controller running, in the namespace of ops.enrol.namespace, " +
		"and may this node ask for certificates? " +
		"kubectl get csr, docs/OPERATIONS.md#identity"
	until := end.Local().Format(time.RFC3339)
	why := ""
	if p := i.GetProblem(); p != "" {
		why = fmt.Sprintf("; %s, since %s", p, i.GetSince().AsTime().Local().Format(time.RFC3339))
	}
	switch {
	case !i.GetExpireTime().IsValid():
		x.fail(check, hint, "there is none yet, nobody is let in over TCP until the controller has signed one%s", why)
	case !end.After(now):
		x.fail(check, hint, "it ended %s ago, at %s, and is not renewed; the controller is refused meanwhile%s",
			round(now.Sub(end)), until, why)
	case why != "":
		x.warn(check, hint, "it serves until %s%s", until, why)
	case i.GetRenewTime().IsValid() && now.Sub(renewal) > overdue:
		x.warn(check, hint, "it was to be renewed at %s and has not been; it ends in %s",
			renewal.Local().Format(time.RFC3339), round(end.Sub(now)))
	default:
		x.ok(check, "until %s, from the controller, renewed from %s on", until, renewal.Local().Format(time.RFC3339))
	}
}

// certificateFile checks when a certificate ends that somebody else puts into a file.
func (x *examination) certificateFile(leaf *x509.Certificate) {
	const check = "certificate"
	end := leaf.NotAfter
	left := end.Sub(x.o.Now())
	hint := fmt.Sprintf("put a new one into %s and %s, which are taken up without a restart",
		x.config.Ops.CertFile, x.config.Ops.KeyFile)
	switch {
	case left <= 0:
		x.fail(check, hint, "it ended %s ago, at %s; the controller is refused meanwhile",
			round(-left), end.Local().Format(time.RFC3339))
	case left < min(soon, end.Sub(leaf.NotBefore)/3):
		x.warn(check, hint, "it ends in %s, at %s", round(left), end.Local().Format(time.RFC3339))
	default:
		x.ok(check, "until %s", end.Local().Format(time.RFC3339))
	}
}

// checkCA returns an error if no certificate of the file is valid now.
func checkCA(file string, now time.Time) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var last error
	for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		switch {
		case err != nil:
			last = fmt.Errorf("%s: %w", file, err)
		case now.After(c.NotAfter) || now.Before(c.NotBefore):
			last = fmt.Errorf("%s: %s is valid from %s to %s only", file, c.Subject,
				c.NotBefore.Local().Format(time.RFC3339), c.NotAfter.Local().Format(time.RFC3339))
		default:
			return nil
		}
	}
	if last == nil {
		last = fmt.Errorf("%s: no certificate in it", file)
	}
	return last
}

// clockUnsynchronised is what adjtimex(2) returns when nothing keeps the clock right (TIME_ERROR in
// linux/timex.h).
const clockUnsynchronised = 5

// clock checks whether something synchronises the clock, on which certificates depend.
func (x *examination) clock() {
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	switch {
	case errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSYS):
	case err != nil:
		x.warn("clock", "", "%v", err)
	case state == clockUnsynchronised:
		x.warn("clock", "run systemd-timesyncd or chrony: certificates depend "+
			"on the time", "nothing keeps the clock right; it says %s", x.o.Now().UTC().Format(time.RFC3339))
	default:
		x.ok("clock", "synchronised")
	}
}
