// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package servingcert keeps the certificate that the webhooks are served with, for all replicas of the controller at once: in a Secret, with
// its CA in the webhook configurations, renewed in time and without a moment in which the API server does not trust what a replica shows.
//
// A certificate has a CA of its own, whose key is thrown away when it has signed it. What is to be trusted is always more than what is shown:
//
//  1. a replica finds that the certificate in the Secret is due, or not there, and writes a new one, with the CA of the one before beside its own;
//  2. all replicas write both CAs into the webhook configurations, and go on showing the old certificate;
//  3. each replica shows the new certificate when it has found its CA in the configurations and API servers have had time to notice;
//  4. an hour later the old CA is taken out.
//
// A replica that starts in between has no old certificate. It shows the new one, and is not ready before its CA is in the configurations.
// All replicas do the same, and none needs to know of the others: each write depends on what was read, so that of two that come at
// once one is refused and looks again.
package servingcert
