"""The plots of the demo stories: how trouble begins, what is done about it, and how it ends well or badly.

Every template works with any object, animal, place and weather, so that these stay independent of the plot.
"""

from __future__ import annotations

from typing import NamedTuple


class Plot(NamedTuple):
    """One plot: sentence templates by stage; ``harm`` is "none" or the kind of harm ``begins`` describes.

    ``missing`` ("obj", "pet" or "") must not be mentioned in the middle and after a bad end.
    """

    name: str
    harm: str
    missing: str
    begins: tuple[str, ...]
    follows: tuple[str, ...]
    good: tuple[str, ...]
    bad: tuple[str, ...]


PLOTS = (
    Plot(
        "lost",
        "none",
        "obj",
        (
            "Then {S} [see] that {his.obj} [be.s] gone.",
            "{later}, {S} [lose] {his.obj} somewhere {place}.",
            "{S} [put] down {his.obj} for a moment, and then it [be.s] nowhere.",
            '"{my} {obj} is gone!" [cry] {Hn}.',
            "Somehow {the.obj} [fall.s] out of {his} bag {place}.",
        ),
        (
            "{S} [look] under {spot} and behind {spot}.",
            "{S} [search] everywhere {place}, even under {spot}.",
            "{N} [help.s] to look for {the.obj}.",
            "{the.pet} [dig.s] beside {spot}, but {the.obj} [be.s] not there.",
            '"Did you leave it under {spot}?" [ask.s] {N}.',
            "{S} [ask] everybody, but nobody [have.s] seen {the.obj}.",
            "{S} [promise] {count} coins to anyone who [can.s] find it.",
        ),
        (
            "In the end {the.pet} [find.s] {the.obj} under {spot}.",
            "Then something {colour} [shine.s] behind {spot}: it [be.s] {the.obj}!",
            "{N} [bring.s] {the.obj} back {adv}.",
            "{later}, {S} [find] {the.obj} just where {he} [have] left it.",
        ),
        (
            "But {the.obj} [be.s] never found.",
            "{S} [find] only the broken pieces of {the.obj}.",
            "{later}, {S} [give] up, and {the.obj} [stay.s] lost for ever.",
            "{N} [have.s] seen {the.obj} sink into the mud.",
        ),
    ),
    Plot(
        "stuck",
        "none",
        "pet",
        (
            "{later}, {the.pet} [be.s] stuck behind {spot}.",
            "Suddenly {the.pet} [fall.s] into a deep hole {place}.",
            "{S} [hear] {the.pet} crying from under {spot}.",
            "{the.pet} [climb.s] too high and [cannot.s] get down.",
            '"Help! The {pet} is trapped!" [shout] {Hn}.',
        ),
        (
            "{S} [pull] with both hands, but {the.pet} only [get.s] more afraid.",
            "{S} [fetch] a rope and some {food}.",
            "{S} [try] to tempt {the.pet} with {food}.",
            "{N} [run.s] for a ladder.",
            '"Keep still," [say] {Hn} {voice}.',
            "{wx} [make.s] the stones slippery.",
            "{count} neighbours [come.p] to help.",
        ),
        (
            "With one last pull, {the.pet} [be.s] free.",
            "{later}, {S} [reach] {the.pet} and [lift] it out {adv}.",
            "{N} [hold.s] the rope, and {S} [bring] {the.pet} up safely.",
            "Then {the.pet} [smell.s] the {food} and [wriggle.s] out.",
        ),
        (
            "But the rope [break.s], and {the.pet} [be.s] badly hurt.",
            "{later}, the hole [fall.s] in, and nobody [can] save {the.pet}.",
            "{S} [come] too late for {the.pet}.",
            "When {the.pet} [be.s] free at last, it [limp.s] away and never [come.s] back.",
        ),
    ),
    Plot(
        "broken",
        "none",
        "obj",
        (
            "Then {S} [drop] {his.obj}, and it [break.s] into {count} pieces.",
            "{later}, {the.pet} [step.s] on {the.obj} and [break.s] it.",
            "{S} [trip] over {spot} and [break] {his.obj}.",
            '"Oh no, {my} {obj} is broken!" [say] {Hn}.',
            "Because of {wx}, {the.obj} [be.s] ruined.",
        ),
        (
            "{S} [pick] up every piece {adv}.",
            "{S} [try] glue, string and even {food}.",
            "{S} [carry] what [be.s] left of {the.obj} to {N}.",
            "{S} [need] a {n.job}, and {Nn} [be.s] a good one.",
            '"That will cost {count} coins," [say.s] {N}.',
            "{S} [read] a book about mending things.",
            "The work [take.s] {count} hours.",
        ),
        (
            "{later}, {the.obj} [be.s] whole again.",
            "{N} [mend.s] {the.obj} so well that it [look.s] new.",
            "{S} [repair] {the.obj} {himself}, and it [be.s] better than before.",
            "The cracks [vanish.p] under {colour} paint, and {the.obj} [be.s] as good as new.",
        ),
        (
            "But nobody [can] mend {the.obj}.",
            "{later}, {the.obj} [fall.s] apart once more, and {S} [throw] it away.",
            "{N} [shake.s] {nhis} head: {the.obj} [be.s] beyond repair.",
            "The last piece [be.s] missing, and {the.obj} [be.s] useless now.",
        ),
    ),
    Plot(
        "journey",
        "none",
        "",
        (
            "{S} [have] to bring {the.obj} to {Nn} in {n.town}.",
            "{later}, {S} [set] out for {n.town} to see {Nn}.",
            "{Nn} [write.s] from {n.town} and [ask.s] for {the.obj}.",
            "{later}, {S} [start] on a long journey with {the.pet}.",
            "{S} [must] cross the mountains before {day}.",
        ),
        (
            "The way [be.s] blocked by {barrier}.",
            "{S} [sleep] under {spot} for {count} nights.",
            "{later}, {S} [take] the wrong road and [come] to {barrier}.",
            "{the.pet} [carry.s] the {food} and [do.s] not complain.",
            "In {wx}, every mile [feel.s] like {count}.",
            "{S} [ask] a {trait} old man for the way.",
            "{S} [have] to climb over {barrier}.",
        ),
        (
            "{later}, {S} [arrive] in time, and {the.obj} [be.s] safe.",
            "{later}, the towers of {n.town} [appear.p], and {Nn} [wave.s] from the gate.",
            "{the.pet} [find.s] the way, and the journey [end.s] well.",
            "{later}, {S} [reach] the end of the road, tired but in good time.",
        ),
        (
            "{later}, {S} [turn] back, for the road [be.s] closed.",
            "When {S} [arrive], {Nn} [have.s] already left {n.town}.",
            "{S} [come] {count} days too late, and nobody [want.s] {the.obj} any more.",
            "The road [end.s] at {barrier}, and {S} [have] to give up.",
        ),
    ),
    Plot(
        "contest",
        "none",
        "",
        (
            "{later}, {S} [hear] about {contest} {place}.",
            "{S} [decide] to take part in {contest}.",
            '"{I} will win {contest}!" [say] {Hn}.',
            "{N} [bet.s] {count} coins that {H} [cannot] win {contest}.",
            "The prize of {contest} [be.s] {prize}.",
        ),
        (
            "{S} [practise] for {count} days {place}.",
            "{S} [train] with {the.pet} every {day}.",
            "{N} [be.s] the judge.",
            "{count} others [want.p] the prize as well.",
            "The others [laugh.p] at {his.obj}.",
            '"You are too {trait} to win," [say.s] {N}.',
            "{wx} almost [spoil.s] everything.",
        ),
        (
            "{S} [win] the first prize!",
            "{later}, the judges [call.p] out the name of {H}, and the crowd [cheer.s].",
            "{S} [beat] all {count} others.",
            "{the.pet} [help.s] so well that {S} [win].",
        ),
        (
            "{S} [come] last, and everybody [laugh.s].",
            "{later}, the judges [send.p] {H} home with nothing.",
            "{S} [fall] at the very first step and [lose].",
            "{the.pet} [spoil.s] it all, and {S} [lose].",
        ),
    ),
    Plot(
        "quarrel",
        "none",
        "",
        (
            "{later}, {S} [quarrel] with {N} about {the.obj}.",
            '"That {obj} is mine!" [shout.s] {N} at {H}.',
            "{S} [forget] to {job_do}, and {N} [be.s] furious.",
            "{N} [say.s] that {the.pet} [have.s] eaten all the {food}.",
            "{S} [laugh] at {Nn}'s {n.own}, and so a quarrel [begin.s].",
        ),
        (
            "For {count} days they [do.p] not speak.",
            "{S} [walk] past {Nn} without a word.",
            '"You are so {trait}!" [shout.s] {Nn}.',
            "{Nn} [slam.s] the door and [go.s] home to {n.town}.",
            "{S} [lie] awake and [think] about it.",
            "{the.pet} [look.s] from one to the other.",
            "{S} [write] a letter of {count} pages to {Nn}.",
        ),
        (
            '"{I} {am} sorry," [say] {Hn}, and {Nn} [smile.s] at last.',
            "{later}, {Nn} [bring.s] {food}, and they [be.p] friends again.",
            "{S} [forgive] {Nn}, and both [laugh.p] about it.",
            "{Nn} [give.s] {him} {the.obj} as a present, and the quarrel [be.s] over.",
        ),
        (
            "{Nn} never [speak.s] to {him} again.",
            "{later}, {Nn} [burn.s] the letters, and the friendship [be.s] over.",
            "{S} [wait] for {Nn}, but {nhe} never [come.s].",
            "The harsh words [cannot.p] be taken back.",
        ),
    ),
    Plot(
        "discovery",
        "none",
        "",
        (
            "{later}, {S} [find] {find} {place}.",
            "Under {spot}, {S} [discover] {find}.",
            "{the.pet} [lead.s] {him} to {find}.",
            '"What is that?" [ask] {Hn}, and [point] at {find}.',
            "While {he} [look] for {food}, {S} [come] upon {find}.",
        ),
        (
            "{S} [show] it to {N}.",
            "{S} [tell] nobody but {the.pet}.",
            "{S} [open] a little {colour} notebook and [draw] it.",
            "{N} [know.s] an old story about it.",
            '"It must be {count} hundred years old," [say.s] {N}.',
            "{S} [use] {the.obj} to look closer.",
            "It [be.s] covered with {colour} dust.",
        ),
        (
            "It [be.s] worth {count} hundred coins, and {S} [keep] half of them.",
            "{later}, the museum [thank.s] {him} for it.",
            "It [bring.s] good luck to {H} for {count} years.",
            "There [be.s] {prize} hidden beside it!",
        ),
        (
            "But it [crumble.s] to dust, and nothing [be.s] left.",
            "{later}, it [be.s] gone, and nobody [believe.s] {H}.",
            "It [bring.s] bad luck to {H} for {count} years.",
            "The owner [come.s] and [send.s] {H} away with harsh words.",
        ),
    ),
    Plot(
        "building",
        "none",
        "",
        (
            "{later}, {S} [begin] to build a {build} {place}.",
            '"{I} need a {build}," [say] {Hn}.',
            "{S} [promise] {N} a new {build}.",
            "The old {build} [have.s] fallen down, so {S} [plan] a new one.",
            "For {the.pet}, {S} [want] to make a {colour} {build}.",
        ),
        (
            "{S} [carry] {count} planks to {the.place}.",
            "{N} [lend.s] {him} a hammer and {count} nails.",
            "{S} [measure] it with {the.obj}.",
            "{wx} [slow.s] the work.",
            "{the.pet} [hold.s] the string.",
            "{S} [paint] one side {colour} and the other side {colour}.",
            "Half of it [fall.s] down, and {S} [start] again.",
        ),
        (
            "{later}, the {build.again} [stand.s] firm, and everyone [admire.s] it.",
            "The {build.again} [be.s] finished on {day}, and it [be.s] perfect.",
            "{N} [call.s] it the finest {build.again} in the land.",
            "{the.pet} [be.s] the first to try the {build.again}, and it [hold.s].",
        ),
        (
            "{later}, the {build.again} [fall.s] down with a crash.",
            "The {build.again} [be.s] never finished.",
            "{N} [laugh.s] at the crooked {build.again}.",
            "{wx} [destroy.s] the {build.again} in a single hour.",
        ),
    ),
    Plot(
        "illness",
        "none",
        "pet",
        (
            "{later}, {the.pet} [be.s] ill and [do.s] not eat.",
            "{the.pet} [refuse.s] even the {food}.",
            "{S} [see] that {the.pet} [be.s] weak and thin.",
            '"The {pet} has a fever," [say] {Hn}.',
            "On {day}, {the.pet} [cannot.s] stand up any more.",
        ),
        (
            "{S} [make] a bed of straw under {spot}.",
            "{S} [send] for {N}, who [know.s] about animals.",
            "{S} [sit] up with {the.pet} for {count} nights.",
            "{S} [boil] {food} with honey.",
            "{S} [sell] {the.obj} to pay for medicine.",
            '"Give it warm {food}," [say.s] {N}.',
            "{S} [cover] {the.pet} with a {colour} blanket.",
        ),
        (
            "{later}, {the.pet} [stand.s] up and [eat.s] all the {food.again}.",
            "{the.pet} [open.s] its eyes and [be.s] well again.",
            "The medicine [work.s], and {the.pet} [run.s] about as before.",
            "{later}, {the.pet} [be.s] stronger than ever.",
        ),
        (
            "{later}, {the.pet} [die.s] in {his} arms.",
            "{the.pet} [close.s] its eyes and never [wake.s] up.",
            "Nothing [help.s], and {the.pet} [die.s] before {day}.",
            "{S} [bury] {the.pet} {place}.",
        ),
    ),
    Plot(
        "feast",
        "none",
        "",
        (
            "{later}, {S} [plan] a great feast {place}.",
            "{S} [invite] {N} and {count} others to supper.",
            '"Let {me} cook {food} for everyone!" [say] {Hn}.',
            "{N} [order.s] {food} for {count} guests.",
            "It [be.s] the birthday of {his} {kin}, so {S} [begin] to cook.",
        ),
        (
            "{S} [stir] {food} and {food} in one big pot.",
            "{the.pet} [taste.s] everything first.",
            "{S} [hang] {colour} paper over the door.",
            "{N} [bring.s] {food} in a basket.",
            "{S} [forget] the salt and [use] {food} instead.",
            "{the.obj} [serve.s] as a table decoration.",
            "{count} plates [fall.p] on the floor.",
        ),
        (
            "Everyone [ask.s] for more, and not a crumb [be.s] left.",
            "{N} [praise.s] the {food.again} above all.",
            "{later}, the guests [sing.p] for {H}.",
            "It [taste.s] wonderful, even to {the.pet}.",
        ),
        (
            "{S} [burn] the {food.again}, and the guests [go.p] home hungry.",
            "Nobody [come.s], and {the.pet} [eat.s] all the {food.again}.",
            "{later}, everyone [have.s] a stomach ache.",
            "{N} [spit.s] it out and [leave.s] at once.",
        ),
    ),
)

HARM_PLOTS = (
    Plot(
        "theft",
        "theft",
        "obj",
        (
            "That night {V} [creep.s] in and [steal.s] {the.obj}.",
            "{V} [snatch.s] {the.obj} and [run.s] away.",
            "{V} [rob.s] {H} {place} and [take.s] {count} coins and {the.obj}.",
            "While {H} [sleep], {V} [break.s] the lock and [steal.s] {the.obj}.",
            "{V} [grab.s] {the.obj} from under the nose of {the.pet}.",
        ),
        (
            "{S} [run] after {V} through {wx}.",
            "{N} [call.s] the guards.",
            "{S} [follow] the footprints to {the.place}.",
            '"Stop, thief!" [shout] {Hn}.',
            "{the.pet} [bite.s] {V} in the leg.",
            "{V} [hide.s] behind {spot}.",
        ),
        (
            "The guards [catch.p] {V}, and {S} [get] everything back.",
            "{V} [drop.s] the bag, and nothing [be.s] missing.",
            "{N} [trip.s] {V} with a stick, and the stolen things [be.p] saved.",
            "{later}, {V} [be.s] sorry and [bring.s] it all back.",
        ),
        (
            "{V} [get.s] away, and {S} never [see] {the.obj} again.",
            "The guards [laugh.p] at {H} and [do.p] nothing.",
            "{later}, {V} [sell.s] everything in another town.",
            "{N} [cannot.s] help, and {V} [be.s] never caught.",
        ),
    ),
    Plot(
        "poison",
        "poison",
        "pet",
        (
            "{V} [pour.s] poison into the well {place}.",
            "{V} secretly [put.s] poison into the {food} of {H}.",
            "{V} [mix.s] rat poison with the {food} to hurt {the.pet}.",
            "That night {V} [poison.s] the water of {the.pet}.",
            "{V} [give.s] {H} a cup of poisoned wine.",
        ),
        (
            "{the.pet} [sniff.s] and [begin.s] to howl.",
            "{S} [taste] something bitter and [turn] pale.",
            "{N} [smell.s] it at once.",
            '"Do not touch it!" [shout.s] {N}.',
            "{S} [feel] sick and [lie] down under {spot}.",
            "{V} [watch.s] from behind {spot}.",
        ),
        (
            "{N} [have.s] the right medicine, and nobody [be.s] harmed.",
            "{S} [pour] it away in time, and everyone [be.s] safe.",
            "{later}, the pain [pass.s], and {V} [be.s] arrested.",
            "{the.pet} [knock.s] over the cup just in time.",
        ),
        (
            "{later}, {the.pet} [die.s] of the poison.",
            "It [be.s] too late, and {S} [be] ill for {count} months.",
            "{V} [ride.s] away laughing, and {H} [become] weak and ill.",
            "The water [stay.s] bad, and everyone [have.s] to leave.",
        ),
    ),
    Plot(
        "fire",
        "fire",
        "pet",
        (
            "{V} [set.s] fire to the barn of {H}.",
            "That night {V} [throw.s] a burning torch onto the roof.",
            "{V} [light.s] a fire under {spot} to burn down the house.",
            "Out of spite, {V} [burn.s] {the.obj} and the whole shed.",
            "{V} [pour.s] oil on the floor and [set.s] the kitchen on fire.",
        ),
        (
            "Black smoke [rise.s] {place}.",
            "{S} [carry] {count} buckets of water.",
            "{the.pet} [be.s] still inside!",
            '"Fire! Fire!" [shout] {Hn}.',
            "{N} [ring.s] the bell.",
            "{wx} [make.s] it worse.",
        ),
        (
            "{later}, the flames [be.p] out, and nobody [be.s] hurt.",
            "{S} [save] {the.pet} and {the.obj} from the flames.",
            "{N} and {count} others [stop.p] the fire, and {V} [be.s] caught.",
            "The fire [die.s] down before it [reach.s] the house.",
        ),
        (
            "{later}, only ashes [be.p] left.",
            "The house [burn.s] to the ground with {the.obj} in it.",
            "{the.pet} [do.s] not come out of the flames.",
            "{N} [come.s] too late, and {V} [watch.s] the ruins and [laugh.s].",
        ),
    ),
    Plot(
        "threat",
        "threat",
        "",
        (
            '"Give me your {obj} or I will hurt you," [hiss.s] {V}.',
            '"Pay me {count} coins or I will kill the {pet}," [say.s] {V}.',
            "{V} [threaten.s] {H} with a knife {place}.",
            '"If you tell anyone, you will be sorry," [whisper.s] {V} to {H}.',
            "{V} [raise.s] a stick and [threaten.s] to beat {H}.",
        ),
        (
            "{S} [tremble] and [step] back.",
            "{the.pet} [hide.s] behind {spot}.",
            "{S} [give] {V} {count} coins, but it [be.s] not enough.",
            '"Leave {me} alone!" [cry] {Hn}.',
            "{N} [hear.s] every word from behind {spot}.",
            "{V} [come.s] closer {adv}.",
        ),
        (
            "{N} [step.s] in, and {V} [run.s] off.",
            "{the.pet} [scream.s] like a wolf, and {V} [flee.s].",
            "{later}, the guards [lead.p] {V} away.",
            "{S} [stand] up to {V} and [win].",
        ),
        (
            "{S} [have] to hand over {the.obj}, and {V} [leave.s] with it.",
            "Nobody [help.s], and {V} [hit.s] {H} hard.",
            "{V} [come.s] back every {day}, and {S} [live] in fear.",
            "{later}, {S} [have] to leave {home.again} because of {V}.",
        ),
    ),
)
