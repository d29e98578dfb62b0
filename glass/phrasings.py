"""How one asks about a function: the phrasings of the dataset docs.

{} is a name, or what a thing does. The last N_TEST of each kind are for the test alone, the one
before them is for validation.
"""

N_TEST = 3


def lines_of(text):
    """The lines of a text, without the space around them, as a list."""
    return [line.strip() for line in text.strip().splitlines()]


QUESTIONS = {
    "does": lines_of("""
        What does {} do?
        What is {} for?
        Explain {}.
        What is the purpose of {}?
        Describe {} in one sentence.
        Tell me what {} does.
        {}: what is it?
        What happens when I use {}?
        What is {}?
        What will {} do?
        Say what {} is for.
        Please explain {} to me.
        I do not understand {}. What does it do?
        What can I do with {}?
        Could you describe {}?
        What is the meaning of {}?
        When is {} useful?
        What does the documentation say about {}?
        Give a short description of {}.
        I would like to know what {} does.
        Say in a few words what {} is.
        {}, what does it do?
        Define {}.
        What job does {} have?
        I found {} in some code. What is it good for?
        Can you tell me about {}?
        Why would I use {}?
        In short, what can {} do for me?
        How would you explain {}?
        Summarise {}.
        What is {} good for?
        What is the use of {}?
        I saw {}. What is that?
        What does calling {} do?
        What is the idea of {}?
        Can {} help me? What does it do?
        Remind me what {} does.
        Tell me about {}.
        Describe {}.
        Which task does {} solve?
        Give me the gist of {}.
        What does one use {} for?
        {} - what does that do?
    """),
    "arguments": lines_of("""
        Which arguments does {} take?
        What are the arguments of {}?
        What is the signature of {}?
        Show the parameters of {}.
        How do I call {}?
        Name the arguments of {}.
        {}: which parameters?
        What can be passed to {}?
        How is {} called?
        List the arguments of {}.
        Which arguments can {} have?
        What does {} take as arguments?
        Please show the signature of {}.
        {}, which arguments?
        Write down the parameters of {}.
        Which values do I give to {}?
        With which arguments is {} called?
        What does {} accept?
        Tell me the arguments of {}.
        How must I call {}?
        What goes into the brackets of {}?
        I want to call {}. With what?
        What should be passed to {}?
        What parameters are there in {}?
        What does a call of {} look like?
        Which parameters does {} have?
        What do I pass to {}?
        Give me the signature of {}, please.
        What can I give to {}?
        How many arguments does {} have, and which?
        Show me how {} is called.
        Which inputs does {} want?
        What do the arguments of {} look like?
        I forgot the arguments of {}.
        What must I hand to {}?
        Does {} take arguments? Which?
        Please list what {} takes.
        What do I need to call {}?
        Which options does {} have?
        Could you show what {} takes?
        What arguments should I give {}?
        Can you list the parameters of {}?
        What does the signature of {} look like?
    """),
    "module": lines_of("""
        In which module is {}?
        Which module has {}?
        Where is {} defined?
        What do I import to use {}?
        From which module does {} come?
        Name the module of {}.
        {}: which module?
        Which module must I import for {}?
        Which module contains {}?
        Where does {} live?
        Where does {} come from?
        What must be imported for {}?
        {}, in which module?
        Tell me the module of {}.
        In what module can I find {}?
        Which import gives me {}?
        What is the home of {}?
        Where in the standard library is {}?
        Which part of the standard library has {}?
        Please name the module that has {}.
        I need {}. Which module has it?
        What module is {} in?
        Who provides {}?
        From where can I import {}?
        Where do I find {}?
        To which module does {} belong?
        What is the module of {} called?
        I want to use {}. What should I import?
        Which module do I need for {}?
        Where is {} kept?
        Where in Python is {}?
        What should I import to get {}?
        What has {} in it?
        {} belongs to which module?
        Where should I look for {}?
        Which library module offers {}?
        Tell me where {} is.
        Which module defines {}?
        How do I import {}?
        Which module gives me {}?
        Which module is home to {}?
        What module should I import for {}?
        Where can I import {} from?
    """),
    "which": lines_of("""
        Which name does this: {}
        What is it called: {}
        Find the name for this: {}
        I am looking for this: {}
        Name what fits this: {}
        What has this description: {}
        Which function, method or class is meant? {}
        Whose documentation begins like this: {}
        What does this: {}
        I need this: {}
        Which name fits: {}
        Search for this: {}
        Name it: {}
        What is the name? {}
        This is what I want: {}
        Which thing of Python is this? {}
        What do I need for this: {}
        Guess the name: {}
        Tell me the name of this: {}
        What could I call for this? {}
        How is this called: {}
        What was the name of this again: {}
        Look this up: {}
        Which one is it? {}
        What should I use for this: {}
        What in the standard library does this: {}
        Is there anything for this? {}
        Help me find this: {}
        Something for this: {}
        What can do this: {}
        Which name has this description: {}
        Is there a name for this: {}
        Find this: {}
        How do I do this: {}
        Who does this: {}
        Give me the name for this: {}
        I want this: {}
        What would do this: {}
        What is meant by this: {}
        What is this thing called: {}
        What do you call this: {}
        I forgot the name of this: {}
        Which part of the library does this: {}
    """),
    "exists": lines_of("""
        Does {} exist?
        Is there {} in the standard library?
        Is {} a real name?
        Does Python have {}?
        Can I use {} in Python?
        {}: does it exist?
        Is {} part of Python?
        Tell me whether {} exists.
        Is there {}?
        Is {} there?
        Does the standard library have {}?
        Is {} in the library?
        Does Python know {}?
        Could {} be a real name?
        I think there is {}. Is that true?
        Is {} available?
        {}, is that real?
        Has Python got {}?
        Is it true that {} exists?
        Would Python find {}?
        Can {} be imported?
        Say whether there is {}.
        Am I right that {} exists?
        Is {} included in Python?
        Do you know {}?
        Have you heard of {}?
        Is {} something that Python comes with?
        Is there really {}?
        Did someone write {}?
        Have you seen {} before?
        Do I have {} in Python?
        Is there a thing named {}?
        Would {} work?
        Do we have {}?
        Are you sure there is {}?
        Can I call {}?
        Is {} known?
        Is the name {} right?
        Will I find {} in Python?
        Is there such a thing as {}?
        Does anything like {} exist?
        Is {} something I can use?
        Is {} in Python's library?
    """),
}
# about what the question before named; the last N_TEST are for the test alone
FOLLOW_UPS = lines_of("""
    And its arguments?
    Which arguments does it take?
    How do I call it?
    What are its parameters?
    And the signature?
    Show its arguments.
    With which arguments?
    What can be passed to it?
    How is it called?
    Now the arguments, please.
    What do I pass to it?
    And what does it take?
    Which parameters has it got?
    What arguments does it have?
    How must I call it?
    Which arguments can I give?
    Its signature, please.
    What are the arguments?
    Which parameters does that have?
    And how would I call that?
""")


def phrasings(kind, split):
    """The phrasings of a kind of question that a split may use, a list."""
    every = FOLLOW_UPS if kind == "conversation" else QUESTIONS[kind]
    of_split = {
        "train": every[: -N_TEST - 1],
        "val": every[-N_TEST - 1 : -N_TEST],
        "test": every[-N_TEST:],
    }
    return of_split[split]
