// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package opsv1

import "time"

// The words of the API that programs compare. They are strings on the wire, because a node may be
// newer or older than the program that reads them: a reader must expect words that are not here.

// Kinds of operations: [Operation.Kind].
const (
	KindRestart = "Restart"
	KindUpgrade = "Upgrade"
)

// Methods by which a node switches from one container to the next, the one with the shortest gap
// first: [ContainerOperation.Method] and [NodeInfoResponse.RestartMethods].
const (
	// MethodGate has the successor wait just before its entrypoint.
	MethodGate = "gate"
	// MethodPidfd starts the successor when the kernel reports the incumbent's exit.
	MethodPidfd = "pidfd"
	// MethodPlain starts the successor when the runtime reports the incumbent's exit.
	MethodPlain = "plain"
	// MethodOverlap starts the successor before the incumbent is stopped (START_FIRST).
	MethodOverlap = "overlap"
	// MethodKubelet is of upgrades only: kubelet creates the successor from the image that the
	// node has put ready.
	MethodKubelet = "kubelet"
)

// ErrorReasonBypassed is the reason in the ErrorInfo of a command that a node refuses because
// kubelet's calls do not go through its cri-proxy; ErrorDomain is the domain of all ErrorInfos.
const (
	ErrorReasonBypassed = "Bypassed"
	ErrorDomain         = "cri-proxy.io"
)

// Reasons of containers: [ContainerOperation.Reason]. Most are of containers that did not succeed.
const (
	// The command or the pod was not as the node found it.
	ReasonExpectedIDDiffers   = "ExpectedIDDiffers"
	ReasonContainerNotRunning = "ContainerNotRunning"
	ReasonNotFound            = "NotFound"
	ReasonPodStopping         = "PodStopping"

	// Somebody or something else ended the container's part of the operation.
	ReasonTakenBackByKubelet     = "TakenBackByKubelet"
	ReasonCancelled              = "Cancelled"
	ReasonEarlierContainerFailed = "EarlierContainerFailed" // of an ordered restart
	ReasonOtherContainerFailed   = "OtherContainerFailed"   // of an upgrade
	ReasonHoldTimeout            = "HoldTimeout"            // of an upgrade that nobody committed
	ReasonPrepareTimeout         = "PrepareTimeout"

	// The image.
	ReasonPullFailed         = "PullFailed"
	ReasonCredentialsNeeded  = "CredentialsNeeded" // the command must be repeated
	ReasonImageUnchanged     = "ImageUnchanged"    // the container's spec has it already
	ReasonImageMoved         = "ImageMoved"        // the tag names another image by now
	ReasonImageNotOverridden = "ImageNotOverridden"
	ReasonImageUnfit         = "ImageUnfit" // it cannot run as that container
	// ReasonErrImageNeverPull is kubelet's word for an absent image with imagePullPolicy Never.
	ReasonErrImageNeverPull = "ErrImageNeverPull"

	// What the successor is made of.
	//
	// ReasonCreateContainerConfigError is kubelet's word for something that the pod's spec names
	// and that does not exist.
	ReasonCreateContainerConfigError = "CreateContainerConfigError"
	ReasonEnvironmentLost            = "EnvironmentLost" // the command must be repeated
	// ReasonInsufficientResources: the pod or the node has no room for two containers at once.
	ReasonInsufficientResources = "InsufficientResources"

	// The steps.
	ReasonCreateFailed        = "CreateFailed"
	ReasonStopFailed          = "StopFailed"
	ReasonStartFailed         = "StartFailed"
	ReasonNewContainerExited  = "NewContainerExited"
	ReasonPostStartHookFailed = "PostStartHookFailed"

	// The node.
	ReasonRuntimeError   = "RuntimeError"
	ReasonJournalError   = "JournalError"
	ReasonJournalVersion = "JournalVersion" // a newer cri-proxy wrote the operation's record
	ReasonNodeRestarted  = "NodeRestarted"
	ReasonInternalError  = "InternalError" // a panic
)

// Reasons of pulls: [PullOperation.Reason]. NotFound, Cancelled, RuntimeError and InternalError are
// reasons of containers too, and do not mean the same there.
const (
	// Of a pull that waits.
	PullReasonInQueue           = "InQueue"
	PullReasonYieldsToKubelet   = "YieldsToKubelet"
	PullReasonBackOff           = "BackOff"
	PullReasonCredentialsNeeded = ReasonCredentialsNeeded

	// Of a pull that succeeded: Present if nothing had to be pulled.
	PullReasonPresent = "Present"
	PullReasonPulled  = "Pulled"

	// Of a pull, or of an attempt, that failed.
	PullReasonNotFound            = "NotFound"
	PullReasonUnauthorized        = "Unauthorized"
	PullReasonRegistryUnavailable = "RegistryUnavailable"
	PullReasonTooManyRequests     = "TooManyRequests"
	PullReasonTimeout             = "Timeout"
	PullReasonDeadlineExceeded    = "DeadlineExceeded"
	PullReasonDiskPressure        = "DiskPressure"
	PullReasonInvalidImage        = "InvalidImage"
	PullReasonRuntimeError        = "RuntimeError"
	PullReasonCancelled           = "Cancelled"
	PullReasonInternalError       = "InternalError" // a panic
)

// Codes of CancelPull: [CancelPullRequest.Code] and [PullOperation.CancelCode].
const (
	CancelCodeChanged   = "Changed"   // the job pulls something else now
	CancelCodeNotChosen = "NotChosen" // the job no longer chooses the node
	CancelCodeOverdue   = "Overdue"   // the pull did not end in its time
	CancelCodeDeadline  = "Deadline"  // the job's time is over
	CancelCodeDeleted   = "Deleted"   // the job was deleted
)

// What a pull does that does not say otherwise.
const (
	DefaultAttempts       = 4
	DefaultAttemptTimeout = 10 * time.Minute
)

// pullBackOffMin and pullBackOffMax bound the wait between the attempts of a pull.
const (
	pullBackOffMin = time.Second
	pullBackOffMax = 30 * time.Second
)

// PullBackOff is how long a pull waits after a failed attempt, which is counted from 1: one second
// after the first, then twice as long each time, 30 seconds at most.
func PullBackOff(attempt int32) time.Duration {
	return min(pullBackOffMin<<min(max(attempt-1, 0), 10), pullBackOffMax)
}

// RetryablePreparation reports whether a preparation of an upgrade that ended for this reason is
// worth another one: the node changed nothing, and what was in the way has passed or may pass.
func RetryablePreparation(reason string) bool {
	switch reason {
	case ReasonHoldTimeout, ReasonTakenBackByKubelet, ReasonExpectedIDDiffers, ReasonContainerNotRunning,
		ReasonCancelled, ReasonJournalError, ReasonRuntimeError, ReasonPodStopping, ReasonNotFound:
		return true
	}
	return false
}

// EndedBefore reports whether the node left a container alone, for this reason, because the one
// that the command is about had ended by itself.
func EndedBefore(reason string) bool {
	return reason == ReasonContainerNotRunning || reason == ReasonExpectedIDDiffers
}

// Armed reports whether kubelet may be told of the new images: an upgrade in this phase takes
// kubelet's stop for its own.
func Armed(phase Phase) bool {
	switch phase {
	case Phase_PHASE_ARMED, Phase_PHASE_ADOPTING, Phase_PHASE_STOPPING, Phase_PHASE_STARTING, Phase_PHASE_REVEALING,
		Phase_PHASE_SUCCEEDED:
		return true
	}
	return false
}

// InQueue reports whether a pull waits for something else than its registry. A pull without an
// attempt does, even in another phase than PULL_WAITING: it then follows another pull of the image.
func InQueue(op *PullOperation) bool {
	if op.GetAttempt() == 0 {
		return true
	}
	switch op.GetReason() {
	case PullReasonInQueue, PullReasonYieldsToKubelet, PullReasonCredentialsNeeded:
		return true
	}
	return false
}
