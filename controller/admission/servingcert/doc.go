// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package servingcert keeps the serving certificate of the webhooks, for all replicas of the
// controller at once: the certificate in a Secret, and its CA in the webhook configurations. It
// renews the certificate in time. At no moment does a replica show a certificate that the API
// server does not trust.
//
// Each certificate has a CA of its own, whose key is thrown away after the signature. The API
// server always trusts more than replicas show:
//
//  1. A replica finds that the certificate in the Secret is due, or that there is none. It writes a
//     new certificate, with the previous CA beside the new one.
//  2. All replicas write both CAs into the webhook configurations, and go on showing the old
//     certificate.
//  3. Each replica shows the new certificate when it has found the new CA in the configurations and
//     API servers have had time to notice.
//  4. An hour later a replica removes the old CA.
//
// A replica that starts in between has no old certificate. It shows the new one, and is not ready
// before the new CA is in the configurations. All replicas do the same, and none needs to know of
// the others: each write depends on what the replica has read. When two replicas write at once, the
// API server refuses one write, and that replica looks again.
package servingcert
